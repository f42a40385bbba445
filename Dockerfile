# The demo, without a GPU:   docker build -t wan-distill . && docker run --rm -v "$PWD/outputs:/home/user/outputs" wan-distill
# With CUDA:                 docker build -t wan-distill --build-arg TORCH_INDEX=https://pypi.org/simple .
#                            docker run --rm --gpus all --ipc=host -v ... wan-distill --config recipes/a14b-1x80gb.yaml
FROM python:3.12-slim-bookworm

# PyTorch's own index has the build for CPUs (about 1 GB less than the one with CUDA, which PyPI has).
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH=2.13.0

RUN useradd --create-home --uid 1000 user
WORKDIR /home/user

# Before the code, so that a change of the code does not install everything again.
COPY requirements.txt ./
RUN pip install --no-cache-dir "torch==${TORCH}" --index-url "${TORCH_INDEX}" \
    && pip install --no-cache-dir -r requirements.txt

COPY pyproject.toml setup.py README.md LICENSE ./
COPY train_distillation.py sample.py test_umt5_weights.py convert_lora.py ./
COPY wan_distill ./wan_distill
COPY assets ./assets
COPY recipes ./recipes
RUN pip install --no-cache-dir --no-deps . && mkdir outputs && chown -R user:user /home/user

USER 1000
ENTRYPOINT ["wan-distill"]
