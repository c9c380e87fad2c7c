"""Parameter-efficient fine-tuning: a frozen model learns through few added parameters. One method a file."""

METHODS = {
    "lora": "low-rank updates of the weights",
    "rslora": "LoRA with alpha / sqrt(rank), for large ranks",
    "dora": "LoRA for the direction of each weight row, one more number for its length",
    "lora+": "LoRA whose second factor learns 16 times as fast",
    "pissa": "LoRA that starts in the largest singular vectors of the weights",
    "adalora": "low-rank updates whose ranks move to the layers that need them",
    "ia3": "one factor per key, value and inner activation",
    "prompt": "embeddings before the text, --lora_rank of them",
    "prefix": "keys and values before the text in every layer, --lora_rank of them",
    "bottleneck": "small networks behind attention and MLP, --lora_rank wide",
}
