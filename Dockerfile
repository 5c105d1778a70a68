# An image with the command openimp. For GPUs, add: --build-arg TORCH=cu128
#
#   docker build --tag openimp . && docker run --rm openimp demo
#   docker run --rm --publish 8000:8000 --volume "$PWD:/data" openimp serve my.index --host 0.0.0.0
FROM python:3.11-slim

ARG TORCH=cpu
WORKDIR /opt/openimp
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY recipes recipes
COPY studies studies
RUN pip install --no-cache-dir --extra-index-url "https://download.pytorch.org/whl/${TORCH}" '.[search]' \
    && useradd --create-home openimp
USER openimp
WORKDIR /data
ENTRYPOINT ["openimp"]
CMD ["--help"]
