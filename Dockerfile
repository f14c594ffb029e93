# Runs `etmamba` on a CPU:
#   docker build -t etmamba-timm .
#   docker run --rm etmamba-timm                                             # classifies the sample video
#   docker run --rm -v "$PWD:/work" etmamba-timm predict clip.mp4
#   docker run --rm -p 127.0.0.1:7860:7860 etmamba-timm demo --host 0.0.0.0 --port 7860
# on an NVIDIA GPU, with `docker run --gpus all`:
#   docker build -t etmamba-timm --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# and the tests:
#   docker build -t etmamba-timm-test --target test . && docker run --rm etmamba-timm-test

ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS base
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir torch torchvision --index-url "$TORCH_INDEX"
WORKDIR /src
COPY . .

FROM base AS test
RUN pip install --no-cache-dir -e '.[test]'
CMD ["pytest", "-n", "2"]

FROM base
RUN pip install --no-cache-dir '.[demo,export]'
# The kernels are compiled for the processor that they run on, so not here. Any user may keep them and downloads:
# docker run --user "$(id -u)" -v etmamba-cache:/cache ...
RUN mkdir -m 1777 /cache
ENV HOME=/cache ETMAMBA_CACHE=/cache/etmamba_timm
WORKDIR /work
USER 1000
ENTRYPOINT ["etmamba"]
CMD ["predict"]
