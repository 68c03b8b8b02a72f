# syntax=docker/dockerfile:1
FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
# Queries are checked against .sqlx/: building needs no database.
ENV SQLX_OFFLINE=true
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --package stockade \
    && cp target/release/stockade /usr/local/bin/stockade

FROM debian:bookworm-slim
RUN useradd --system --uid 10001 --user-group --no-create-home stockade
COPY --from=build /usr/local/bin/stockade /usr/local/bin/stockade
COPY LICENSE /usr/share/doc/stockade/LICENSE
USER stockade
ENV STOCKADE_HTTP_ADDR=0.0.0.0:8080 \
    STOCKADE_LOG_FORMAT=json
EXPOSE 8080
# SIGTERM begins a shutdown that ends by itself within 10 seconds.
STOPSIGNAL SIGTERM
# Healthy is who wants traffic. The image has no curl; bash can open a connection.
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s --retries=3 \
    CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/8080 && printf 'GET /readyz HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n' >&3 && read -r line <&3 && [[ $line == 'HTTP/1.1 200 '* ]]"]
ENTRYPOINT ["stockade"]
CMD ["serve"]
