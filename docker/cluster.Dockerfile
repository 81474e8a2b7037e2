# A node of a Ray cluster that tunes; every node runs the same image.
#   docker build -f docker/cluster.Dockerfile -t stagevar-ray .
#   head:    docker run --gpus all --network host --shm-size 8g stagevar-ray --head --port 6379
#   workers: docker run --gpus all --network host --shm-size 8g stagevar-ray --address HEAD:6379
# Run directories must lie on storage that all nodes mount under the same path.
FROM python:3.11-slim

WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY stagevar stagevar
COPY tuner tuner
COPY search_spaces search_spaces
# The version is that of this source; its dependencies follow from it.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[tune,ray,infinity,metrics]" && rm -rf /src && useradd --create-home --uid 1000 stagevar

USER 1000
WORKDIR /work
ENV RAY_USAGE_STATS_ENABLED=0
ENTRYPOINT ["ray", "start", "--block"]
CMD ["--head", "--port", "6379"]
