import torch
def gather_tokens(x, ids): return x.gather(1, ids.unsqueeze(-1).expand(-1,-1,x.shape[-1]))
