# kdns as an image that takes the place of CoreDNS's: the same arguments, the same ports. As
# /usr/local/bin/kube-proxy it takes kube-proxy's place, with kube-proxy's arguments.
#
#     docker build -t kdns:0.1.0 .
#     docker run --rm -p 1053:53/udp -v "$PWD/Corefile:/etc/coredns/Corefile:ro" \
#         kdns:0.1.0 -conf /etc/coredns/Corefile
#     docker run --rm --entrypoint kube-proxy kdns:0.1.0 --help

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
# The proxy runs as root with NET_ADMIN alone, and the kernel would refuse it an interpreter that
# asks for another capability (below): it gets a copy that asks for none. -P: not even a file in
# the working directory is taken for a module.
RUN cp /opt/kdns/bin/python /opt/kdns/bin/python-plain \
    && printf '#!/bin/sh\nexec /opt/kdns/bin/python-plain -P -m kdns proxy "$@"\n' \
        > /opt/kdns/bin/kube-proxy \
    && chmod 0755 /opt/kdns/bin/kube-proxy
# Port 53 without root. Kubernetes hands NET_BIND_SERVICE to the container, but a process that
# is not root only gets it through its file. As with CoreDNS's image, the container must be
# allowed the capability (`capabilities: {add: [NET_BIND_SERVICE], drop: [ALL]}`), or the
# kernel refuses to run the file at all. COPY keeps the attribute with BuildKit.
RUN setcap cap_net_bind_service=+ep /opt/kdns/bin/python

FROM ${PYTHON}
LABEL org.opencontainers.image.title="kdns" \
      org.opencontainers.image.description="A cluster DNS server and node proxy in Python, for CoreDNS's and kube-proxy's place" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
# What `kdns proxy` writes rules with. The package iptables has both variants, nft and legacy,
# and kdns takes the one that the node uses. nft is for people who look at the result. There is
# no modprobe: it would need SYS_MODULE; the kernel itself loads what nft asks for.
RUN apt-get update \
    && apt-get install -y --no-install-recommends iptables nftables \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/kdns /opt/kdns
# Where kubeadm's DaemonSet expects it.
RUN ln -s /opt/kdns/bin/kube-proxy /usr/local/bin/kube-proxy
ENV PATH=/opt/kdns/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# The number of "nonroot" in distroless images, CoreDNS's among them; a number, so that
# `runAsNonRoot: true` can be checked. The proxy needs `runAsUser: 0`, which deploy/proxy says.
USER 65532:65532
WORKDIR /
EXPOSE 53/udp 53/tcp 8080/tcp 8181/tcp 9153/tcp
# No HEALTHCHECK: Kubernetes asks /health and /ready, and a Corefile need not have either.
# SIGTERM, Docker's own stop signal, begins the lameduck time.
ENTRYPOINT ["kdns"]
