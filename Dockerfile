# docker build -t loratool .                                 CPU build of torch
# docker build -t loratool --build-arg TORCH_FROM= .         torch as PyPI has it, with CUDA
# docker run --rm -u "$(id -u):$(id -g)" -v "$PWD:/work" loratool merge base adapter -o merged
FROM python:3.12-slim
ARG TORCH_FROM="--index-url https://download.pytorch.org/whl/cpu"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HOME=/tmp
WORKDIR /src
COPY constraints.txt ./
RUN pip install --constraint constraints.txt torch $TORCH_FROM
COPY pyproject.toml README.md LICENSE ./
COPY loratool loratool
RUN pip install --constraint constraints.txt .
WORKDIR /work
ENTRYPOINT ["loratool"]
