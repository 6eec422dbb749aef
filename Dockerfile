# syntax=docker/dockerfile:1
# The live page in a container:
#   docker build -t rest_lightning .
#   docker run --rm -p 127.0.0.1:8765:8765 rest_lightning
# The CUDA build of torch (run it with --gpus all):
#   docker build -t rest_lightning:cuda --build-arg DEVICE=cu130 .
# Any other command: docker run --rm -v "$PWD:/work" rest_lightning talk portrait.png speech.wav -o out.mp4
# tools/newcomer.sh container does the steps of this file without Docker.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
# cpu, or a release of CUDA as PyTorch's index names it
ARG DEVICE=cpu
# where torch comes from; empty: the package index, which has the CUDA build
ARG TORCH_INDEX=https://download.pytorch.org/whl/${DEVICE}
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /venv
WORKDIR /src
COPY constraints.txt ./
# A layer of its own: torch stays while the code changes. --no-compile: below, only what is used is compiled.
RUN /venv/bin/pip install --no-compile -c constraints.txt ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} \
        torch torchvision
COPY pyproject.toml README.md LICENSE ./
COPY rest_lightning rest_lightning
COPY callbacks callbacks
COPY configs configs
RUN /venv/bin/pip install --no-compile -c constraints.txt '.[serve]' \
    && /venv/bin/python -c 'import rest_lightning.serve.server as _; from rest_lightning import TalkingHead; TalkingHead.from_pretrained()'

FROM python:${PYTHON}-slim-bookworm
RUN useradd --create-home --uid 1000 rest && mkdir /work && chown rest /work
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
USER 1000
WORKDIR /work
EXPOSE 8765
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8765/healthz', timeout=4)"]
ENTRYPOINT ["rest"]
CMD ["serve", "--host", "0.0.0.0"]
