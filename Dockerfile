# loratune with CUDA. It has not been built yet: no machine with Docker and a GPU has been at hand.
#   docker build -t loratune .
#   docker run --gpus all -v "$PWD":/work -v loratune-cache:/home/loratune/.cache loratune sft --config recipe.yaml
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
