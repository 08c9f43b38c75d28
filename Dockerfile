# kdns as an image that takes the place of CoreDNS's: the same arguments, the same ports.
#
#     docker build -t kdns:0.1.0 .
#     docker run --rm -p 1053:53/udp -v "$PWD/Corefile:/etc/coredns/Corefile:ro" \
#         kdns:0.1.0 -conf /etc/coredns/Corefile

ARG PYTHON=python:3.11-slim

FROM ${PYTHON} AS build
# Only here, for setcap; the image that runs has neither.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libcap2-bin \
    && rm -rf /var/lib/apt/lists/*
# --copies: the capability below goes to this one interpreter, not to every Python.
RUN python -m venv --copies /opt/kdns
WORKDIR /src
COPY requirements.lock ./
COPY pyproject.toml README.md LICENSE ./
COPY kdns/ kdns/
# The lock holds for the build backend as well. Byte code is written now, for the root file
# system is read-only later.
RUN PIP_CONSTRAINT=/src/requirements.lock PIP_DISABLE_PIP_VERSION_CHECK=1 \
    /opt/kdns/bin/python -m pip install --no-cache-dir --compile . \
    && /opt/kdns/bin/python -m pip uninstall -y pip setuptools
# Port 53 without root. Kubernetes hands NET_BIND_SERVICE to the container, but a process that
# is not root only gets it through its file. As with CoreDNS's image, the container must be
# allowed the capability (`capabilities: {add: [NET_BIND_SERVICE], drop: [ALL]}`), or the
# kernel refuses to run the file at all. COPY keeps the attribute with BuildKit.
RUN setcap cap_net_bind_service=+ep /opt/kdns/bin/python

FROM ${PYTHON}
LABEL org.opencontainers.image.title="kdns" \
      org.opencontainers.image.description="A cluster DNS server in Python that takes CoreDNS's place" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
COPY --from=build /opt/kdns /opt/kdns
ENV PATH=/opt/kdns/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# The number of "nonroot" in distroless images, CoreDNS's among them; a number, so that
# `runAsNonRoot: true` can be checked.
USER 65532:65532
WORKDIR /
EXPOSE 53/udp 53/tcp 8080/tcp 8181/tcp 9153/tcp
# No HEALTHCHECK: Kubernetes asks /health and /ready, and a Corefile need not have either.
# SIGTERM, Docker's own stop signal, begins the lameduck time.
ENTRYPOINT ["kdns"]
