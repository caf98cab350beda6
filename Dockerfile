# docker build -t hooktrail .
FROM rust:1-bookworm AS builder
WORKDIR /src
COPY . .
# The caches keep the dependencies over builds; what is in a cache is not in the image, so the program is copied out.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked && cp target/release/hooktrail /usr/local/bin/hooktrail

# The same Debian as the builder's: the program is linked to its libc.
FROM debian:bookworm-slim
# hooktrail trusts the system's certificates for https:// and amqps://.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/*
# A number, so that Kubernetes' runAsNonRoot can see that it is not root.
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin hooktrail
# For [queue] data_dir = "/var/lib/hooktrail" of the embedded queue, with a volume there: a new volume gets this owner.
RUN install --directory --owner=10001 --group=10001 --mode=0750 /var/lib/hooktrail
COPY --from=builder /usr/local/bin/hooktrail /usr/local/bin/hooktrail
USER 10001
# The C library keeps what was freed for each thread apart: in two places instead of eight for each core.
ENV MALLOC_ARENA_MAX=2
# Mount the configuration here. Give the container more time to stop than `shutdown_timeout`, or the drain is cut short.
ENV HOOKTRAIL_CONFIG=/etc/hooktrail/hooktrail.toml
ENTRYPOINT ["hooktrail"]
CMD ["run"]
