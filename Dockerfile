# loratune with CUDA:
#   docker build -t loratune .
#   docker run --gpus all -v "$PWD":/work -v loratune-cache:/home/loratune/.cache loratune sft --config recipe.yaml
#   docker run --gpus all -v "$PWD":/work -p 8000:8000 loratune serve --model merged --host 0.0.0.0
#
# Built with Buildah on Debian 12 with its Python 3.11 in place of the image below. There it has trained, merged and
# served on a CPU as its user. It has not run with Docker and a GPU yet.
#
# torch's own wheels bring CUDA's libraries, so the base needs Python only; constraints.txt is tested with 3.11.
FROM python:3.11-slim-bookworm

# Triton compiles its launchers when a kernel runs first.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

COPY . /opt/loratune
RUN pip install --no-cache-dir --constraint /opt/loratune/constraints.txt "/opt/loratune[eval,export,gpu,serve,sweep]"

# The mounted folder should be writable for this user: docker run --user "$(id -u):$(id -g)" -e HOME=/tmp otherwise.
RUN useradd --create-home --uid 1000 loratune && mkdir -p /home/loratune/.cache && chown loratune /home/loratune/.cache
USER loratune
VOLUME /home/loratune/.cache
WORKDIR /work
ENTRYPOINT ["loratune"]
CMD ["--help"]
