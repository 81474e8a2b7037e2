# The runtime alone, for drawing with a profile:
#   docker build -f docker/runtime.Dockerfile -t stagevar .
#   docker run --gpus all -v "$PWD:/work" stagevar generate --profile profile.yaml "a photo of a red circle" -o red.png
# To serve over HTTP (docs/serving.md):
#   docker build -f docker/runtime.Dockerfile --build-arg EXTRAS=infinity,serve -t stagevar-serve .
#   docker run --gpus all -p 8000:8000 -v "$PWD:/work" stagevar-serve serve --profile profile.yaml --host 0.0.0.0
FROM python:3.11-slim

ARG EXTRAS=infinity
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY stagevar stagevar
COPY tuner tuner
COPY search_spaces search_spaces
# The version is that of this source; its dependencies follow from it.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[${EXTRAS}]" && rm -rf /src && useradd --create-home --uid 1000 stagevar

USER 1000
WORKDIR /work
ENTRYPOINT ["stagevar"]
CMD ["--help"]
