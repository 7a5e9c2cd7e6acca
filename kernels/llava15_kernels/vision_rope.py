import torch

def vision_rope_tables(position_ids, inv_freq, class_pos_emb):
    angles = (position_ids.to(torch.float32)[:, :, None] * inv_freq.to(torch.float32)).flatten(1)
    angles = torch.where(position_ids[:, :1] < 0, class_pos_emb.to(torch.float32), angles)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope_tables(q, k, cos, sin):
    cos, sin = cos[:, None], sin[:, None]

    def rotate(x):
        x32 = x.float()
        first, second = x32.chunk(2, dim=-1)
        return (x32 * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)

    return rotate(q), rotate(k)
