"""What does the predictor expect behind the mask? Retrieval of the true cell, error maps and nearest real cells, beside two means and the untrained twin.

    python bench/predictions.py --json results/predictions_cifar10_cpu.json
    python bench/predictions.py --model runs/demo --json FILE

--model is a run directory, a model.safetensors or pretrained:NAME, trained with a predictor. The bank holds --bank training images; --images
test images are asked about, under masks drawn as in training.
"""
import argparse, base64, json, sys, time
from pathlib import Path
import numpy as np, torch
from scipy.stats import spearmanr
from attention import model_and_twin                             # of this folder
from hjepa.analyze.attention import interval
from hjepa.analyze.embedding import sheet
from hjepa.analyze.predictions import ask_pixels, bank, error_maps, expect, retrieval
from hjepa.bench import machine
from hjepa.config import HJEPAError
from hjepa.data.sets import load as load_set
from hjepa.evaluate.probes import stratified_subset
from hjepa.evaluate.probing import side_of

SHOWN, NEAR = 4, 3                                               # images of which something is drawn; neighbours

def jpeg(images): return base64.b64encode(sheet(images, 32, 90).tobytes()).decode()

def tidy(t, n=3): return np.round(np.asarray(t, dtype=float), n).tolist()

def alike(maps): # per image, rank correlation over its cells of the predictor's loss and of the mean's
    "Is an error map a map of what is unusual?"
    v = [spearmanr(a, b).statistic for a, b in zip(*(maps[p].flatten(1).numpy() for p in ('predictor', 'place')))]
    return interval([x for x in v if np.isfinite(x)])

def errors(maps, level):
    "Mean loss of a level, relative to chance, and the map of the mean image."
    out = {p: dict(mean=interval(m.flatten(1).nanmean(1)), map=tidy(m.nanmean(0))) for p, m in maps.items()}
    out['gain'] = {r: interval((maps[r] - maps['predictor']).flatten(1).nanmean(1)) for r in ('place', 'seen')}
    return out | (dict(like_place=alike(maps)) if maps['place'][0].numel() > 4 else {})

def examples(model, images, b, seed):
    "One asked cell a level and image, with the nearest real cells of every player and of the truth."
    masks, strip = model.draw_masks(len(images), torch.Generator().manual_seed(seed)), []
    rows = [r for l in range(len(b.cells)) for r in expect(model, images, masks, b, l, k=NEAR)]
    for r in rows:
        r['near'] = {p: r['near'][p] for p in ('predictor', 'seen', 'truth')}
        for pairs in r['near'].values():
            for q in pairs: strip.append(b.images[q[0]]); q[0] = len(strip) - 1
    return dict(rows=rows, images=jpeg(images), near=jpeg(torch.stack(strip)))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='pretrained:cifar10-cpu-long-20k'); p.add_argument('--data', default='cifar10'); p.add_argument('--bank', type=int, default=2000)
    p.add_argument('--images', type=int, default=2000); p.add_argument('--draws', type=int, default=2, help='masks an image for retrieval'); p.add_argument('--maps', type=int, default=96, help='masks an image for error maps')
    p.add_argument('--candidates', type=int, default=100); p.add_argument('--note', help='where the weights come from, if the name does not say')
    p.add_argument('--seed', type=int, default=0); p.add_argument('--json', required=True, metavar='FILE')
    a = p.parse_args(); t0 = time.perf_counter()
    model, twin = model_and_twin(a.model); size = side_of(model)
    train, test = (load_set(a.data, s, image=size) for s in ('train', 'test'))
    real, asked = (s.subset(stratified_subset(s.labels, n, a.seed)).images for s, n in ((train, a.bank), (test, a.images)))
    asked = asked[torch.randperm(len(asked), generator=torch.Generator().manual_seed(a.seed))]   # the first ones are shown
    got, err = {}, {}
    for arm, m in (('hjepa', model), ('untrained', twin)):
        b = bank(m, real); got[arm] = retrieval(m, asked, b, a.draws, a.candidates, seed=a.seed)
        maps = error_maps(m, asked[:500], b, a.maps, seed=a.seed); err[arm] = [errors(v, l) for l, v in enumerate(maps)]
        if arm == 'hjepa': shown = dict(examples(m, asked[:SHOWN], b, a.seed), grids=[list(g) for g in m.grids], maps=[{k: tidy(v[:8], 2) for k, v in ms.items()} for ms in maps], mapped=jpeg(asked[:8]))
    raw = retrieval(model, asked, bank(model, real, pixels=True), a.draws, a.candidates, seed=a.seed, by=ask_pixels)
    for l, o in enumerate(got['hjepa']): o |= dict(untrained=got['untrained'][l]['predictor'], pixels=raw[l]['seen'])
    facts = dict(machine('cpu'), model=a.note or a.model, data=a.data, bank=len(real), images=len(asked), candidates=a.candidates, seed=a.seed, seconds=round(time.perf_counter() - t0, 1))
    out = facts | dict(retrieval=got['hjepa'], untrained=got['untrained'], errors=err, shown=shown)
    Path(a.json).write_text('{' + ',\n '.join(f'{json.dumps(k)}: {json.dumps(v)}' for k, v in out.items()) + '}\n')
    return 0

if __name__ == '__main__':
    try: sys.exit(main())
    except HJEPAError as e: print(f'predictions.py: {e}', file=sys.stderr); sys.exit(2)
