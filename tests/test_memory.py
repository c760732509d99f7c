"Gradient checkpointing: the same step, fewer bytes kept, and none of what is kept left out of the count."
import json
import pytest, torch
from hjepa.bench import Step, bench_memory, memory_table, saved_bytes, weigh
from hjepa.cli import main
from hjepa.config import change
from tiny import tiny

def deep(n=4, **kw): return tiny(**{'encoder.depth': n, 'levels.depths': (2, n, n), **kw})

def saved(r): # bytes, and the gradients
    s = Step(r); s.model.calibrate(s.pieces())
    loss, n = saved_bytes(lambda: s.loss(*next(s.pieces())), [*s.model.parameters(), *s.model.buffers(), s.views])
    loss.backward()
    return n, torch.cat([p.grad.flatten() for p in s.params if p.grad is not None])

def test_same_step_fewer_bytes(): # with all that draws at random
    r = deep(**{'encoder.drop_path': .5, 'encoder.registers': 2, 'encoder.layer_scale': .1})
    (off, a), (on, b) = [weigh(change(r, **{'encoder.checkpoint': c}), 'cpu') for c in (False, True)]
    assert off['loss'] == pytest.approx(on['loss'], abs=1e-6) and float((a - b).norm()) <= 1e-5 * float(a.norm()) and len(a) > 1000
    assert on['saved_bytes'] < .8 * off['saved_bytes'] and on['peak_bytes'] < off['peak_bytes']

@pytest.mark.parametrize('kw', [{'encoder.windows': 2, 'masks.hidden': (0, 7)}, {'train.accumulate': 2}, {'prediction.gradient': True, 'optim.ema': 0., 'optim.ema_end': 0.}])
def test_also_beside_other_switches(kw):
    (off, a), (on, b) = [saved(deep(**kw, **{'encoder.checkpoint': c})) for c in (False, True)]
    assert on < .8 * off and float((a - b).norm()) <= 1e-5 * float(a.norm())

def test_a_block_more_costs_its_input_and_no_more():
    r = deep(); row = r.views.count * r.train.batch * (r.grid**2 - r.hidden_patches) * r.encoder.dim * 4       # bytes of a block's input
    more = lambda c: saved(deep(5, **{'encoder.checkpoint': c}))[0] - saved(deep(4, **{'encoder.checkpoint': c}))[0]
    assert more(True) == row and more(False) > 5 * row

def test_saved_bytes_counts_a_storage_once_and_leaves_out_what_stands():
    s = Step(tiny()); piece = next(s.pieces()); stand = [*s.model.parameters(), *s.model.buffers()]
    a, b = (saved_bytes(lambda: s.loss(*piece), skip)[1] for skip in ((), stand))
    assert 0 < a - b <= sum(p.nbytes for p in stand)

def test_bench_memory_says_it_in_json_and_in_words(tmp_path, capsys):
    assert main(['bench', 'memory', '--recipe', 'cifar10-cpu', '--device', 'cpu', '--steps', '1', '--rounds', '1', '--json', str(tmp_path/'m.json'),
                 'encoder.dim=16', 'encoder.heads=2', 'predictor.dim=16', 'predictor.heads=2', 'whole.hidden=32', 'train.batch=8', 'encoder.checkpoint=true']) == 0
    d = json.loads((tmp_path/'m.json').read_text()); words = capsys.readouterr().out
    assert d['saved'] < 1 and d['off']['saved_bytes'] > d['on']['saved_bytes'] and d['time'] > 0 and d['gradient_difference'] < 1e-5 and d['peak_of']
    assert memory_table(d) in words and 'saved' in words
    assert main(['bench', 'memory', '--recipe', 'cifar10-cpu', '--image', '64']) == 2
