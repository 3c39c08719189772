# An image for the ranks. With Docker:    docker build -t rsb-cluster .
# for Apptainer:   apptainer build rsb-cluster.sif docker-daemon://rsb-cluster:latest
# for pyxis:       enroot import -o rsb-cluster.sqsh dockerd://rsb-cluster:latest
FROM python:3.12-slim

COPY . /src
# The wheel of torch brings CUDA and NCCL; the host's driver comes with --nv, or with pyxis.
RUN pip install --no-cache-dir --constraint /src/constraints.txt /src && rm -r /src
