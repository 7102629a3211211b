# CPU (the default):
#   docker build -t stitch .
#   mkdir -p runs && docker run --rm -v "$PWD/runs:/stitch/runs" stitch
# CUDA, with PyPI's own build of torch, which brings its CUDA libraries (the host needs NVIDIA's
# driver and container toolkit); for an older driver give that CUDA's index from pytorch.org:
#   docker build --build-arg TORCH_INDEX= -t stitch:cuda .
#   mkdir -p runs && docker run --rm --gpus all -v "$PWD/runs:/stitch/runs" stitch:cuda
# Any other command: docker run --rm stitch python algorithms/iql.py --help
# Where your user id is not 1000, build with --build-arg UID="$(id -u)" too.
# Data in Minari's store on the host: add -v "$HOME/.minari:/home/stitch/.minari"
FROM python:3.11-slim

# g++ is for torch.compile. Debian keeps one version of each in a release, so no pins here.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/*

# The user's id, so that a mounted runs/ belongs to the person who looks at it.
ARG UID=1000
RUN useradd --create-home --uid "$UID" stitch \
    && install -d -o stitch -g stitch /stitch /stitch/runs
USER $UID
WORKDIR /stitch

# make reads TORCH_INDEX from the environment. This layer is rebuilt only when these files change.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY --chown=stitch:stitch Makefile requirements.txt ./
RUN PIP_NO_CACHE_DIR=1 make setup

COPY --chown=stitch:stitch . .
ENV PATH="/stitch/.venv/bin:$PATH"
CMD ["make", "train"]
