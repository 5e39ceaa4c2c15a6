# docker build -t sdpo . && docker run --gpus all -v "$PWD/out:/runs/out" -v "$PWD/store:/runs/store" sdpo --help
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PATH=/opt/venv/bin:$PATH SDPO_STORE=/runs/store
RUN apt-get update && apt-get install -y --no-install-recommends git python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* && python3 -m venv /opt/venv
WORKDIR /sdpo
COPY requirements.txt .
RUN pip install --requirement requirements.txt
COPY . .
RUN pip install --no-deps .
WORKDIR /runs
ENTRYPOINT ["sdpo-train"]
