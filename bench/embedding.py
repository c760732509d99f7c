"""Maps of every level by PCA and three seeds of UMAP, of a trained encoder, its untrained twin and raw pixels, on a data set and on procedural scenes.

    python bench/embedding.py --out results/embedding_cifar10_cpu.npz
    python bench/embedding.py --model runs/demo --out FILE

--model is a run directory, a model.safetensors, pretrained:NAME or timm:NAME. Features are means over the cells of each level. The images
are test images, and scenes that no training set uses.
"""
import argparse, sys, time
import torch
from attention import model_and_twin                             # of this folder
from hjepa.analyze.embedding import animal_or_vehicle, brightness, hue, laid_flat, save_maps
from hjepa.bench import machine
from hjepa.config import HJEPAError
from hjepa.data.scenes import COLOURS, LAYOUTS, SHAPES, TEXTURES, scenes
from hjepa.data.sets import load as load_set
from hjepa.evaluate.features import features, pixels
from hjepa.evaluate.probes import stratified_subset
from hjepa.evaluate.probing import side_of

def photographs(data, n, size):
    "Images, colours and names of a data set's test images."
    s = load_set(data, 'test', image=size); s = s.subset(stratified_subset(s.labels, n, 0))
    c, names = {'class': s.labels}, {'class': s.classes}
    if data == 'cifar10': c['kind'], names['kind'] = animal_or_vehicle(s.classes, s.labels)
    return s.images, c, names

def drawn(n, size):
    "Images, colours and names of scenes."
    x, y = scenes(n, size, seed=730_000)
    return x, {k: y[k] for k in ('colour', 'shape', 'texture', 'layout', 'x', 'y', 'size', 'count', 'horizon')}, dict(colour=COLOURS, shape=SHAPES, texture=TEXTURES, layout=LAYOUTS)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='pretrained:cifar10-cpu-long-20k'); p.add_argument('--data', default='cifar10')
    p.add_argument('--images', type=int, default=500); p.add_argument('--thumbs', type=int, default=60, help='images of which a thumbnail is kept')
    p.add_argument('--note', help='where the weights come from, if the name does not say'); p.add_argument('--out', required=True, metavar='NPZ')
    a = p.parse_args()
    facts = dict(machine('cpu'), model=a.note or a.model)
    model, twin = model_and_twin(a.model); t, sets, size = time.perf_counter(), {}, side_of(model)
    for name, (x, colours, names) in {a.data: photographs(a.data, a.images, size), 'scenes': drawn(a.images, size)}.items():
        mix = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))                  # the first ones have thumbnails
        x, colours = x[mix], {k: v[mix] for k, v in colours.items()}
        maps = {arm: [laid_flat(z) for z in features(m, x, dict(levels=['mean']))['levels']['mean']] for arm, m in (('hjepa', model), ('untrained', twin))} | dict(pixels=[laid_flat(pixels(x))])
        sets[name] = dict(maps=maps, colours=colours | dict(brightness=brightness(x), hue=hue(x)), names={k: [*v] for k, v in names.items()}, images=x[:a.thumbs])
    save_maps(a.out, facts | dict(images=a.images, seconds=round(time.perf_counter() - t, 1)), sets)
    return 0

if __name__ == '__main__':
    try: sys.exit(main())
    except HJEPAError as e: print(f'embedding.py: {e}', file=sys.stderr); sys.exit(2)
