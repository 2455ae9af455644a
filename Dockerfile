# The pipeline on CPUs, with all that it needs. Runs are written into the folder that is mounted:
#   docker build --build-arg UID="$(id -u)" -t ringformer .
#   docker run --rm -v "$PWD:/work" ringformer train --config my.yaml
#   docker run --rm -v "$PWD:/work" -p 127.0.0.1:5050:5050 ringformer \
#     serve --model my-model --host 0.0.0.0
# The pinned torch brings CUDA's libraries, which fairseq2's native library was built for; they are
# most of the image.

# With a compiler: DeepSpeed builds its optimizer when it first trains.
FROM python:3.12-slim-bookworm AS base
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ procps \
    && rm -rf /var/lib/apt/lists/*

FROM base AS environment
COPY . /opt/ringformer
RUN /opt/ringformer/run.sh setup

FROM base
ARG UID=1000
RUN useradd --non-unique --no-log-init --create-home --uid "$UID" ringformer \
    && install --directory --owner=ringformer /work
COPY --from=environment --chown=ringformer /opt/ringformer /opt/ringformer
USER $UID
WORKDIR /work
ENTRYPOINT ["/opt/ringformer/run.sh"]
CMD ["--help"]
