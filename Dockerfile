# The image of a run: docker build --build-arg device=cpu|cuda|tpu --tag maxtext .
# It holds the versions of constraints.txt, and whoever runs it is no root.
ARG python=3.11

FROM python:${python}-slim-bookworm AS build
ARG device=cpu
WORKDIR /source
RUN python -m venv --without-pip /opt/maxtext
# What it needs first: a layer that a change of the sources leaves as it is.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY maxtext/__init__.py maxtext/
RUN case $device in \
      cpu) extras=tensorboard,hf ;; \
      cuda | tpu) extras=tensorboard,hf,$device ;; \
      *) echo "device=$device: use cpu, cuda or tpu" >&2; exit 2 ;; \
    esac && \
    pip --python /opt/maxtext/bin/python install --no-cache-dir --constraint constraints.txt ".[$extras]"
COPY . .
RUN pip --python /opt/maxtext/bin/python install --no-cache-dir --no-deps --force-reinstall .

FROM python:${python}-slim-bookworm
RUN useradd --uid 1000 --create-home maxtext && install --directory --owner=1000 --group=1000 /data
COPY --from=build /opt/maxtext /opt/maxtext
ENV PATH=/opt/maxtext/bin:$PATH PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /home/maxtext
CMD ["python", "-m", "train", "--help"]
