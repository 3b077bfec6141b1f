"Text from left to right: GPT and LLaMA, what they share, and their weights in the layout of the Hugging Face hub."
import json
import math

import pytest
import torch

from ssl_nb.app.generate import generate
from ssl_nb.app.run import pretrain
from ssl_nb.core.encoders import create_encoder, load_encoder, save_encoder
from ssl_nb.core.loader import DataInfo, make_dls
from ssl_nb.data.running import letter_tokenizer, running_dls
from ssl_nb.masked.gpt import GPT, GPTEncoder, load_gpt2, save_gpt2
from ssl_nb.masked.left_to_right import counters, next_probs, prompt_ids, read_hub, write_hub
from ssl_nb.masked.llama import LLaMA, LlamaEncoder, load_llama, rms_norm, rotary, save_llama

INFO = DataInfo(kind='text', vocab_size=30, max_len=12)
METHODS = GPT, LLaMA
SWITCHES = [dict(rms=False), dict(rotary=False), dict(swiglu=False), dict(kv_heads=4), dict(kv_heads=1), dict(bias=True), dict(tied=False)]
ENCODERS = [('small_gpt', {})] + [('small_llama', kw) for kw in ({}, *SWITCHES)]
encoders = pytest.mark.parametrize('name, kw', ENCODERS, ids=lambda o: str(o))


def encoder(name, kw=None, big=30):
    "Weights so large that attention is far from even"
    torch.manual_seed(0)
    enc = create_encoder(name, INFO, **kw or {}).eval()
    with torch.no_grad():
        for p in enc.parameters():
            if p.ndim>1: p.mul_(big if p.std()<0.015 else big/5)
    return enc


def ids(*shape): return torch.randint(1, 30, shape, generator=torch.Generator().manual_seed(1))


# --- what every encoder keeps ---

@encoders
@torch.no_grad()
def test_a_later_token_changes_no_earlier_logit(name, kw):
    enc, x = encoder(name, kw), ids(2, 12)
    before = enc.scores(enc.read(x)[0])
    for at in (1, 6, 11):
        other = x.clone()
        other[:,at] = (x[:,at]+7)%29+1
        moved = (enc.scores(enc.read(other)[0])-before).abs().amax((0,2))
        assert moved[:at].max()==0 and moved[at:].min()>1e-4


@encoders
@torch.no_grad()
def test_cached_equals_uncached(name, kw):
    "Features step by step, and 40 tokens of which most lie beyond the context of 12"
    enc, x = encoder(name, kw), ids(2, 12)
    past, steps = None, []
    for t in range(12):
        h, past = enc.read(x[:,t:t+1], past)
        steps.append(h)
    assert torch.allclose(torch.cat(steps, 1), enc.read(x)[0], atol=1e-4)
    within = [enc.generate(x[:,:3], 9, cache=c, generator=torch.Generator().manual_seed(2)) for c in (True,False)]
    assert torch.equal(*within) and enc.generate(x[:,:3], 40).shape==(2,43)


@encoders
@torch.no_grad()
def test_padding_changes_nothing(name, kw):
    enc, x = encoder(name, kw), ids(3, 6)
    padded = torch.nn.functional.pad(x, (0,6))
    assert torch.allclose(enc(padded), enc(x), atol=1e-5)
    h, real = enc.tokens(padded)
    assert torch.equal(real, padded!=0) and torch.allclose(enc.tokens(padded, torch.tensor([[0,5]]*3))[0], h[:,[0,5]])


@encoders
def test_saved_and_loaded(name, kw, tmp_path):
    enc = encoder(name, kw)
    save_encoder(enc, tmp_path)
    again = load_encoder(tmp_path)
    assert type(again) is type(enc) and torch.equal(again.scores(again(ids(2, 12))), enc.scores(enc(ids(2, 12))))


def test_a_gpt_saved_without_dropout_in_its_arguments_still_loads(tmp_path):
    "Folders of before have the class under its name, the same names of weights, and no `drop`"
    enc = encoder('small_gpt')
    save_encoder(enc, tmp_path)
    config = json.loads((tmp_path/'config.json').read_text())
    assert config['architecture']=='ssl_nb.masked.gpt.GPTEncoder'
    assert sorted(enc.state_dict())[:4]==['blocks.0.attention.out.bias', 'blocks.0.attention.out.weight', 'blocks.0.attention.qkv.bias', 'blocks.0.attention.qkv.weight']
    assert {'blocks.1.mlp.0.weight', 'blocks.1.mlp.2.bias', 'embedding.weight', 'positions', 'norm.bias'} <= {*enc.state_dict()}
    del config['model_args']['drop'], config['config_sha256']
    (tmp_path/'config.json').write_text(json.dumps(config))
    assert torch.equal(load_encoder(tmp_path)(ids(2, 12)), enc(ids(2, 12)))


@pytest.mark.parametrize('name', ['small_gpt', 'small_llama'])
def test_dropout_is_for_training(name):
    enc = encoder(name, dict(drop=0.5))
    x = ids(2, 12)
    assert torch.equal(enc(x), enc(x))
    enc.train()
    assert not torch.equal(enc(x), enc(x))


# --- parts of LLaMA ---

def test_rotary_knows_distances_only():
    q, k = torch.randn(2, 1, 1, 32, generator=torch.Generator().manual_seed(0)).unbind()
    product = lambda m, n, **kw: (rotary(q, m, **kw)@rotary(k, n, **kw).mT).item()
    for base in (10000., 100.):
        apart = {d: [product(s+d, s, base=base) for s in (0, 1, 7, 300)] for d in (0, 1, 5)}
        for row in apart.values(): assert max(row)-min(row)<1e-3
        assert abs(apart[0][0]-apart[1][0])>1e-2 and abs(apart[1][0]-apart[5][0])>1e-2
    assert abs(product(1, 5)-product(5, 1))>1e-2 # left and right are not alike
    assert torch.equal(rotary(q, 0), q)


def test_rotary_turns_a_whole_text_as_its_tokens():
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    each = torch.cat([rotary(x[:,:,t:t+1], t+4) for t in range(9)], 2)
    assert torch.allclose(rotary(x, 4), each, atol=1e-6)
    i, m = 2, 6 # pair 2 of four, at position 6, by the formula
    a, b, angle = x[0,0,m,i].item(), x[0,0,m,i+4].item(), m*10000**(-2*i/8)
    out = rotary(x)[0,0,m]
    assert out[i].item()==pytest.approx(a*math.cos(angle)-b*math.sin(angle), abs=1e-5)
    assert out[i+4].item()==pytest.approx(a*math.sin(angle)+b*math.cos(angle), abs=1e-5)
    with pytest.raises(ValueError, match='the width is 7, which is odd'): rotary(torch.ones(2,7))


def test_rms_norm_by_loops_and_by_torch():
    x, g = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 2, 8)
    for row, out in zip(x.flatten(0, 1), rms_norm(x, g, 1e-3).flatten(0, 1)):
        rms = math.sqrt(sum(v.item()**2 for v in row)/8+1e-3)
        assert out.tolist()==pytest.approx([v.item()/rms*w.item() for v,w in zip(row, g)], abs=1e-5)
    assert torch.allclose(rms_norm(x, g), torch.nn.functional.rms_norm(x, (8,), g, 1e-5), atol=1e-6)
    half = rms_norm(x.half()*300, g) # squares that 16 bits do not hold
    assert half.dtype is torch.float32 and torch.allclose(half, rms_norm(x.half().float()*300, g), atol=2e-2)


def test_heads_that_do_not_fit():
    for kw, said in ((dict(heads=3), 'dim=64 and heads=3'), (dict(kv_heads=3), 'kv_heads=3 does not divide heads=4'), (dict(dim=12, heads=4), 'even number')):
        with pytest.raises(ValueError, match=said): create_encoder('small_llama', INFO, **kw)


# --- drawing ---

def test_what_is_drawn_follows_the_probabilities():
    enc, x = encoder('small_gpt'), ids(1, 5)
    with torch.no_grad(): p = next_probs(enc.scores(enc.read(x)[0][:,-1])/40, top_k=5)[0]
    enc.scores = lambda h: (h@enc.embedding.weight.T)/40
    drawn = enc.generate(x.expand(4000, -1), 1, top_k=5, generator=torch.Generator().manual_seed(0))[:,-1]
    share = drawn.bincount(minlength=30)/4000
    assert (p>0).sum()==5 and p.max()<0.9 and (share-p).abs().max()<0.03 and share[p==0].sum()==0


@pytest.mark.parametrize('bad, said', [(dict(temp=-1.), 'temp=-1.0'), (dict(temp=float('nan')), 'temp=nan'), (dict(top_k=0), 'top_k=0'), (dict(top_p=0.), 'top_p=0.0'), (dict(top_p=1.1), 'top_p=1.1')])
def test_dials_that_make_no_sense(bad, said):
    with pytest.raises(ValueError, match=said): next_probs(torch.zeros(1,4), **bad)


def test_counters_by_loops():
    rows = torch.tensor([[2,5,6,5,6,3,0,0], [2,6,5,5,3,0,0,0]])
    held = torch.tensor([[2,5,6,9,3,0,0,0]]) # 9 was never seen
    got = counters(make_dls([((rows,), None), ((held,), None)], DataInfo(kind='text', vocab_size=10), bs=1))
    pairs = [(a,b) for r in rows.tolist() for a,b in zip(r, r[1:]) if b]
    share = lambda b: (sum(q==b for _,q in pairs)+1)/(len(pairs)+10)
    bigram = lambda a, b: (pairs.count((a,b))+5*share(b))/(sum(q==a for q,_ in pairs)+5)
    asked = [(2,5), (5,6), (6,9), (9,3)]
    assert list(got.values())==pytest.approx([math.log(10), -sum(math.log(share(b)) for _,b in asked)/4, -sum(math.log(bigram(*p)) for p in asked)/4], abs=1e-5)


# --- bad input ---

@pytest.mark.parametrize('cls', METHODS)
def test_prompts_that_are_none(cls):
    method = cls(create_encoder(cls.default_encoder, INFO), letter_tokenizer('the cat'))
    for bad, said in ((torch.zeros(1,0).long(), 'at least one in each row, and not .1, 0.'), (torch.ones(3).long(), 'not .3,.'), (torch.ones(1,13).long(), '13 tokens, and this encoder reads at most 12'),
                      (torch.tensor([[30]]), 'outside 0 to 29'), ('XYZ', "prompt 'XYZ' has no token that the tokenizer knows"), ('the cat the cat', '16 tokens, and this encoder reads at most 12')):
        with pytest.raises(ValueError, match=said): method.generate(bad, 3)
    assert method.generate(torch.ones(1,12).long(), 3).shape==(1,15)
    with pytest.raises(ValueError, match='needs the tokenizer of the data'): cls(method.encoder).generate('the', 3)
    assert prompt_ids(method.tokenizer, '').tolist()==[[2]]


@pytest.mark.parametrize('cls', METHODS)
def test_rows_longer_than_the_context(cls, tmp_path):
    (tmp_path/'a.txt').write_text('the cat sat. '*30)
    dls = running_dls(tmp_path/'a.txt', max_len=20, bs=4)
    short = create_encoder(cls.default_encoder, dls.info, max_len=16)
    with pytest.raises(ValueError, match='rows of a have 21 tokens, and the encoder takes at most 16: build it with max_len=21'): cls.for_data(short, dls)
    with pytest.raises(ValueError, match='text of 21 tokens, but this encoder takes at most 16'): short(dls.one_batch()[0])
    with pytest.raises(ValueError, match=f'{cls.__name__} needs an encoder that looks to the left only, and TextTransformer sees all; {cls.default_encoder} is one'):
        cls(create_encoder('small_text', dls.info))


@pytest.mark.parametrize('text, kw, said', [
    ('', {}, 'a.txt: a part of it holds no text'), ('  \n'*50, {}, 'a.txt: a part of it holds no text'),
    ('xyz'*50, dict(tokenizer=letter_tokenizer('abc')), 'a.txt: a part of it holds no token that the tokenizer knows'),
    ('abc'*50, dict(max_len=140), '135 tokens are too few for a row of 141'), ('abc'*50, dict(max_len=140, rows=9), '135 tokens are too few for a row of 141')])
def test_running_text_that_is_none(text, kw, said, tmp_path):
    (tmp_path/'a.txt').write_text(text)
    with pytest.raises(ValueError, match=said): running_dls(tmp_path/'a.txt', **dict(max_len=8, bs=2) | kw)


@pytest.mark.parametrize('name', ['gpt', 'llama'])
def test_a_run_writes(name, tmp_path):
    (tmp_path/'a.txt').write_text('\n'.join(['the cat sat on the mat', 'the dog ran to the gate']*20))
    run = pretrain(name, tmp_path/'a.txt', out=tmp_path/'run', epochs=1, batch_size=8, device='cpu', supervised=False)
    said = generate(run, 'the cat', 5, device='cpu')
    assert said.startswith('the cat') and said==generate(run, 'the cat', 5, device='cpu')!=generate(run, 'the cat', 5, seed=1, device='cpu')
    for kw, what in ((dict(prompt=' '), "prompt ' ' has no token"), (dict(prompt='the cat '*40), 'at most 64'), (dict(n=0), 'n=0'), (dict(top_k=0), 'top_k=0')):
        with pytest.raises(ValueError, match=what): generate(run, **dict(device='cpu') | kw)


# --- the layout of the hub ---
# Expected values by transformers 5.24.0 and torch 2.14.1, from tiny networks whose weights are `formula` of their sorted names:
#   m = GPT2LMHeadModel(GPT2Config(vocab_size=13, n_positions=10, n_embd=8, n_layer=2, n_head=2)).eval()
#   m = LlamaForCausalLM(LlamaConfig(vocab_size=13, max_position_embeddings=10, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
#       num_key_value_heads=2, rope_parameters=dict(rope_type='default', rope_theta=500.), rms_norm_eps=1e-6, tie_word_embeddings=TIED)).eval()
#   m.load_state_dict(formula(m.state_dict()), strict=False); m.tie_weights()      # lm_head.weight left out where it is tied
#   m(torch.tensor([IDS]), output_hidden_states=True).hidden_states[-1][0,-1]

IDS = [5, 2, 7, 11, 3, 3, 9, 1]
GPT2 = [0.99359, 0.31832, -0.74972, -1.3875, -1.0952, -0.26306, 0.43175, 0.81807]
LLAMA = {False: [1.42212, 1.17023, -0.68846, -0.66386, 0.67561, 0.97775, -0.23403, -1.74787, -1.1042, 1.31422, 1.54064, -0.43799, -0.84448, 0.44522, 1.01912, -0.00295],
         True: [-1.88348, -0.56518, 1.65928, 0.98474, -0.67622, -0.28069, 0.77572, 0.55802, -0.95051, -1.68805, 0.13724, 1.63158, 0.28012, -0.81662, 0.17372, 0.97875]}


def formula(shapes):
    "Weights by name: the sine of the index, shifted by the place of the name; gains around one"
    out = {}
    for n, (name, shape) in enumerate(sorted(shapes.items())):
        index = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
        out[name] = (torch.sin(index*0.7+n)*0.3 + (len(shape)==1 and 'weight' in name)).float()
    return out


def gpt2_shapes(D=8, depth=2):
    shapes = {'wte.weight': (13,D), 'wpe.weight': (10,D), 'ln_f.weight': (D,), 'ln_f.bias': (D,)}
    matrices = {'attn.c_attn': (D,3*D), 'attn.c_proj': (D,D), 'mlp.c_fc': (D,4*D), 'mlp.c_proj': (4*D,D)}
    for i in range(depth):
        for name, (a,b) in matrices.items(): shapes |= {f'h.{i}.{name}.weight': (a,b), f'h.{i}.{name}.bias': (b,)}
        for name in ('ln_1','ln_2'): shapes |= {f'h.{i}.{name}.{p}': (D,) for p in ('weight','bias')}
    return {'transformer.'+k: v for k,v in shapes.items()}


def llama_shapes(tied, D=16, M=20, depth=2):
    shapes = {'embed_tokens.weight': (13,D), 'norm.weight': (D,)}
    parts = {'input_layernorm': (D,), 'post_attention_layernorm': (D,), 'mlp.down_proj': (D,M), 'mlp.gate_proj': (M,D), 'mlp.up_proj': (M,D),
             'self_attn.q_proj': (D,D), 'self_attn.k_proj': (D//2,D), 'self_attn.v_proj': (D//2,D), 'self_attn.o_proj': (D,D)}
    shapes |= {f'layers.{i}.{k}.weight': v for i in range(depth) for k,v in parts.items()}
    return {'model.'+k: v for k,v in shapes.items()} | ({} if tied else {'lm_head.weight': (13,D)})


GPT2_CONFIG = dict(model_type='gpt2', vocab_size=13, n_positions=10, n_embd=8, n_layer=2, n_head=2, activation_function='gelu_new', layer_norm_epsilon=1e-5)
def llama_config(tied, **kw):
    return dict(model_type='llama', vocab_size=13, max_position_embeddings=10, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, rms_norm_eps=1e-6, tie_word_embeddings=tied, hidden_act='silu') | (kw or dict(rope_parameters=dict(rope_type='default', rope_theta=500.)))


def last(enc): return enc.read(torch.tensor([IDS]))[0][0,-1].tolist()


@pytest.mark.parametrize('prefix', ['transformer.', '']) # the network with its head, and alone
def test_gpt2_has_the_hidden_states_of_transformers(tmp_path, prefix):
    weights = {prefix+k.removeprefix('transformer.'): v for k,v in formula(gpt2_shapes()).items()}
    write_hub(tmp_path/'a', GPT2_CONFIG, weights)
    enc = load_gpt2(tmp_path/'a')
    assert last(enc)==pytest.approx(GPT2, abs=1e-4)
    save_gpt2(enc, tmp_path/'b') # and the way back: the same names, values and fields
    config, again = read_hub(tmp_path/'b', 'gpt2', '')
    assert {k: config[k] for k in GPT2_CONFIG}==GPT2_CONFIG
    there = formula(gpt2_shapes())
    assert again.keys()==there.keys() and all(torch.equal(again[k], there[k]) for k in there)


@pytest.mark.parametrize('tied', [False, True])
def test_llama_has_the_hidden_states_of_transformers(tmp_path, tied):
    weights = formula(llama_shapes(tied))
    write_hub(tmp_path/'a', llama_config(tied), weights)
    enc = load_llama(tmp_path/'a')
    assert last(enc)==pytest.approx(LLAMA[tied], abs=1e-4)
    head = weights['model.embed_tokens.weight' if tied else 'lm_head.weight']
    assert torch.allclose(enc.scores(torch.tensor(LLAMA[tied])), torch.tensor(LLAMA[tied])@head.T, atol=1e-5)
    save_llama(enc, tmp_path/'b')
    config, again = read_hub(tmp_path/'b', 'llama', '')
    assert {k: config[k] for k in llama_config(tied)}==llama_config(tied)
    assert again.keys()==weights.keys() and all(torch.equal(again[k], weights[k]) for k in weights)
    write_hub(tmp_path/'c', llama_config(tied, rope_theta=500.), weights) # as configurations were before
    assert last(load_llama(tmp_path/'c'))==pytest.approx(LLAMA[tied], abs=1e-4)


def test_folders_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no config.json beside a .safetensors'): load_gpt2(tmp_path)
    write_hub(tmp_path, GPT2_CONFIG, formula(gpt2_shapes()))
    with pytest.raises(ValueError, match="model_type: 'gpt2', and what is read here has 'llama'"): load_llama(tmp_path)
    write_hub(tmp_path, GPT2_CONFIG | dict(activation_function='relu'), formula(gpt2_shapes()))
    with pytest.raises(ValueError, match="activation_function: 'relu'"): load_gpt2(tmp_path)
    write_hub(tmp_path, GPT2_CONFIG | dict(n_layer=3), formula(gpt2_shapes()))
    with pytest.raises(ValueError, match='blocks.2.norm1.weight of shape .8,. is missing in the weights'): load_gpt2(tmp_path)
    write_hub(tmp_path, GPT2_CONFIG | dict(vocab_size=12), formula(gpt2_shapes()))
    with pytest.raises(ValueError, match='embedding.weight of shape .12, 8. is .13, 8. in the weights'): load_gpt2(tmp_path)
    write_hub(tmp_path, llama_config(True, rope_parameters=dict(rope_type='llama3', rope_theta=1.)), formula(llama_shapes(True)))
    with pytest.raises(ValueError, match="stretches its angles .'llama3'."): load_llama(tmp_path)
    with pytest.raises(ValueError, match='all parts of LLaMA'): save_llama(create_encoder('small_llama', INFO, rms=False), tmp_path)
