# docker build -t tqexport .
# docker run --rm -v "$PWD:/data" tqexport onnx ckpt.pt --bits 8
FROM python:3.11
# A package index with CPU builds of PyTorch keeps gigabytes of CUDA libraries out of the image.
ARG PIP_EXTRA_INDEX_URL=""
COPY . /opt/tqexport
RUN make -C /opt/tqexport install
ENV PATH="/opt/tqexport/.venv/bin:$PATH"
WORKDIR /data
ENTRYPOINT ["tqexport"]
