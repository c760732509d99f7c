"The growth of a step: processes that train together, and the commands."
import json, os
import pytest, torch
from hjepa.cli import main
from hjepa.config import HJEPAError
from hjepa.growth import Group, processes
from hjepa.model import build
from hjepa.timing import bench_recipe, fewer_levels
from tiny import tiny

SMALL = 'encoder.dim=16 encoder.heads=2 encoder.depth=2 levels.depths=[1,2,2] predictor.heads=2'.split()
TOY = '--device cpu --image 96 --patch 8 --batch 4 --predictor 24x1 --images 4 --rounds 2'.split()

class Bar:
    n = 0
    def update(self): self.n += 1

@pytest.mark.skipif(os.cpu_count() < 2, reason="needs two cores")
def test_a_group_trains_together_and_takes_turns():
    bar = Bar(); got = processes(tiny(), 'cpu', 'fp32', False, images=8, rounds=2, bar=bar)
    assert [r['x'] for r in got['rows']] == [1, max(n for n in range(1, os.cpu_count() + 1) if 8 % n == 0)]
    assert all(len(r['rounds']) == 2 and min(r['rounds']) > 0 for r in (*got['rows'], got['threads'])) and bar.n == 6
    assert got['exponent_range'][0] <= got['exponent'] <= got['exponent_range'][1]

def test_a_group_that_cannot_train_says_why():
    g = Group(2, 1, tiny(), 'cpu', 'fp8', False)
    with pytest.raises(HJEPAError, match='ended early.*precision'): g(1)
    g.close()

def test_growth_of_the_command_line(tmp_path, capsys):
    assert main(['bench', 'growth', *TOY, '--axes', 'tokens', 'levels', '--json', str(tmp_path/'g.json'), *SMALL]) == 0
    res, said = json.loads((tmp_path/'g.json').read_text()), capsys.readouterr().out
    assert [r['x'] for r in res['axes']['tokens']['rows']] == [64, 144, 289, 576] and 'price' in res['axes']['levels']
    assert res['axes']['tokens']['flops_exponent'] > res['axes']['tokens']['flops_exponent_without_attention']
    assert '3 levels take' in said and 'without attention' in said

def test_attention_and_latency_of_the_command_line(tmp_path, capsys):
    assert main(f'bench attention --tokens 64 128 --total 128 --heads 1 --rounds 2 --device cpu --json {tmp_path}/a.json'.split()) == 0
    assert [r['tokens'] for r in json.loads((tmp_path/'a.json').read_text())['rows']] == [64, 128]
    assert main(f'bench latency --encoders vit_tiny --image 32 --calls 2 --device cpu --json {tmp_path}/l.json'.split()) == 0
    assert {*json.loads((tmp_path/'l.json').read_text())['rows']['vit_tiny']['sides']} == {'ours, all levels', 'timm, one map'}
    assert 'times as fast' in (said := capsys.readouterr().out) and 'timm, one map' in said

def test_fewer_levels_answer_as_many_questions_from_as_many_patches():
    r = bench_recipe()
    for n in (1, 2, 3):
        few = fewer_levels(r, n); m = build(few)
        masks = m.draw_masks(2, torch.Generator().manual_seed(0))
        assert masks.context.shape[1] == 51 and sum(t.shape[1] for t in masks.targets) == 53 and len(masks.targets) == n
