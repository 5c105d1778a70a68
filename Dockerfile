# An image with the command openimp. For GPUs, add: --build-arg TORCH=cu128
#
#   docker build --tag openimp . && docker run --rm openimp demo
#   docker run --rm --publish 8000:8000 --volume "$PWD:$PWD" --workdir "$PWD" openimp serve my.index --media . --host 0.0.0.0
#
# An index has absolute paths, so the folder has the same path in the container. A container does not know which folders
# you indexed; --media says that the page may show files below this one. Training with train.num_workers needs
# more shared memory than Docker gives: add --shm-size 8g.
FROM python:3.11-slim

ARG TORCH=cpu
WORKDIR /opt/openimp
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
COPY recipes recipes
COPY studies studies
# hadolint ignore=DL3013  # constraints.txt has the versions.
RUN pip install --no-cache-dir --constraint constraints.txt \
      --extra-index-url "https://download.pytorch.org/whl/${TORCH}" '.[search]' \
    && useradd --create-home --uid 1000 openimp \
    && install --directory --owner openimp /data
USER 1000
WORKDIR /data
ENTRYPOINT ["openimp"]
CMD ["--help"]
