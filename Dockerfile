# mics-fast with its trainer, on a CPU or an NVIDIA GPU (docker run --gpus all). Built from the sdist:
#   python -m build --sdist && docker build --tag mics-fast .
FROM python:3.12-slim-bookworm AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt dist/mics_fast-*.tar.gz /sdist/
RUN python -m venv /opt/mics \
    && PIP_CONSTRAINT=/sdist/constraints.txt /opt/mics/bin/pip install --no-cache-dir \
       "$(echo /sdist/mics_fast-*.tar.gz)[train,dali,export]"

FROM python:3.12-slim-bookworm
# libgomp: the threads of torch; gcc: what Triton and torch.compile compile with.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home mics
COPY --from=build /opt/mics /opt/mics
ENV PATH=/opt/mics/bin:$PATH
USER mics
WORKDIR /home/mics
CMD ["mics-fast", "--help"]
