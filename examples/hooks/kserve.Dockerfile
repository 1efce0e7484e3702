# KServe's own storage initializer, and the gate after it. In a clone of bshub, DIR holding policy.toml and pub.pem:
#   docker build -f examples/hooks/kserve.Dockerfile --build-context policy=DIR -t REGISTRY/gated-initializer .
# Reading a receipt needs neither torch nor anything else that is large.
FROM kserve/storage-initializer:v0.15.2
USER root
COPY . /tmp/bshub
RUN python -m pip install --no-cache-dir --no-deps /tmp/bshub \
    && python -m pip install --no-cache-dir typer cryptography \
    && install -m 755 /tmp/bshub/examples/hooks/kserve-initializer.sh /usr/local/bin/kserve-initializer.sh \
    && rm -rf /tmp/bshub
COPY --from=policy policy.toml pub.pem /etc/bshub/
ENV BSHUB_POLICY=/etc/bshub/policy.toml BSHUB_KEY=/etc/bshub/pub.pem
USER 1000
ENTRYPOINT ["/usr/local/bin/kserve-initializer.sh"]
