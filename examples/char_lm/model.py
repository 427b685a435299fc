"""A small pre-norm GPT over bytes.

The 256 byte values are the whole vocabulary: there is no tokenizer, and the loss of an untrained model is
the 8 bits that a byte holds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256


class Attention(nn.Module):
    """Causal multi-head self-attention.

    Args:
        width: Channels; a multiple of ``heads``.
        heads: Attention heads.
        dropout: Probability of dropping an attention weight while training.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got width={width}, heads={heads}")
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix each position with those before it; ``x`` is (batch, time, width)."""
        batch, time, width = x.shape
        # (batch, time, 3, heads, head width) -> three tensors of (batch, heads, time, head width)
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    """One layer: attention, then a perceptron, each added to the residual stream.

    Args:
        width: Channels of the residual stream.
        heads: Attention heads.
        dropout: Probability of dropping an entry of what a branch adds.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Residual stream in, residual stream out: (batch, time, width)."""
        x = x + self.drop(self.attention(self.attention_norm(x)))
        return x + self.drop(self.down(functional.gelu(self.up(self.mlp_norm(x)))))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out.

    Args:
        layers: Blocks.
        width: Channels of the residual stream.
        heads: Attention heads of each block.
        context: The longest input, in bytes.
        dropout: Dropout probability everywhere.
    """

    def __init__(self, layers: int, width: int, heads: int, context: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self._initialize(layers)
        # One matrix reads bytes and writes them. Tied after the initialization, so that it is drawn once,
        # with the embedding's deviation: the head's first logits are then close to zero, the loss to 8 bits.
        self.head.weight = self.embedding.weight

    def _initialize(self, layers: int) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # 2 * layers branches add to the residual stream; scaled so that its variance does not grow with depth.
        for block in self.blocks:
            assert isinstance(block, Block)
            for linear in (block.attention.out, block.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, bytes_in: Tensor) -> Tensor:
        """Logits of the byte after each position.

        Args:
            bytes_in: Integers below 256, (batch, time) with ``time <= context``.

        Returns:
            (batch, time, 256).
        """
        time = bytes_in.shape[1]
        if time > self.context:
            raise ValueError(
                f"a window of {time} bytes is longer than the model's context of {self.context};"
                " set --model.context and --data.context alike"
            )
        x = self.embedding(bytes_in) + self.position.weight[:time]
        x = self.drop(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.no_grad()
    def generate(self, prompt: bytes, length: int, *, temperature: float = 0.8, seed: int = 0) -> bytes:
        """Continue ``prompt``.

        Args:
            prompt: At least one byte.
            length: How many bytes to add.
            temperature: Below 1 keeps to likelier bytes; 0 takes the likeliest.
            seed: Of the draw. The global random state is neither read nor changed.

        Returns:
            The prompt and its continuation.
        """
        if not prompt:
            raise ValueError("the prompt must hold at least one byte")
        device = self.position.weight.device
        generator = torch.Generator().manual_seed(seed)
        text = torch.tensor([list(prompt)], dtype=torch.long, device=device)
        was_training = self.training
        self.eval()
        for _ in range(length):
            logits = self(text[:, -self.context :])[0, -1].float().cpu()
            if temperature == 0:
                chosen = logits.argmax(keepdim=True)
            else:
                chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            text = torch.cat([text, chosen.to(device)[None]], dim=1)
        self.train(was_training)
        return bytes(text[0].tolist())
