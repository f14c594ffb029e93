"""J-HMDB: 928 short clips of real video, 21 classes of HMDB-51."""
