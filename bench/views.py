"""Our views on the device against kornia's containers of the same operations, from bytes to normalised views, in turns.

    python bench/views.py                        # on the CPU; needs `pip install kornia`, which hjepa itself does not use
    python bench/views.py --device cuda --json results/views_kornia_cuda.json

Two programs: crop, flip, jitter, grey ('jitter'), and crop, flip, one of grey, solarise, blur, jitter ('3aug'; kornia's choice is
three effects of probability 1/3 each, since its containers choose for a batch and not for an image). kornia resamples or
slices its crops: the faster one counts. A row is the median over rounds of seconds a batch, and the ratio of the medians.
"""
import argparse, json, statistics, time
import torch, kornia
import kornia.augmentation as K
from hjepa.bench import machine
from hjepa.config import Views
from hjepa.data.views import draw_views, make_views

MEAN, STD = (.485, .456, .406), (.229, .224, .225)
PROGRAMS = {'jitter': Views(), '3aug': Views(kind='3aug', jitter=1., brightness=.3, contrast=.3, saturation=.3, hue=0.)}

def kornias(v:Views, size, mode):
    effects = [K.RandomGrayscale(p=v.gray)] if v.kind == 'jitter' else [K.RandomGrayscale(p=1/3), K.RandomSolarize(thresholds=(.5, .5), additions=(0., 0.), p=1/3), K.RandomGaussianBlur((13, 13), v.sigma, p=1/3)]
    jitter = K.ColorJitter(v.brightness, v.contrast, v.saturation, v.hue, p=v.jitter)
    return K.AugmentationSequential(K.RandomResizedCrop((size, size), scale=v.scale, ratio=v.ratio, cropping_mode=mode), K.RandomHorizontalFlip(p=v.flip),
        *([jitter] + effects if v.kind == 'jitter' else effects + [jitter]), K.Normalize(torch.tensor(MEAN), torch.tensor(STD)))

def seconds(f, device):
    sync = torch.cuda.synchronize if torch.device(device).type == 'cuda' else lambda: None
    sync(); t = time.perf_counter(); f(); sync()
    return time.perf_counter() - t

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='cpu'); p.add_argument('--threads', type=int, default=2); p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--json', metavar='FILE')
    a = p.parse_args(); torch.set_num_threads(a.threads); rows = []
    for B, S in ((256, 32), (64, 224)):
        x = torch.randint(256, (B, 3, S, S), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(a.device)
        for name, v in PROGRAMS.items():
            g, them = torch.Generator().manual_seed(0), {m: kornias(v, S, m).to(a.device) for m in ('resample', 'slice')}
            todo = {'ours': lambda: make_views(x, draw_views(B, v, g), S, MEAN, STD),
                    **{m: lambda k=k: [k(x.float() / 255) for _ in range(v.count)] for m, k in them.items()}}
            for f in todo.values(): f()
            took = {k: [] for k in todo}
            for _ in range(a.rounds):
                for k, f in todo.items(): took[k].append(seconds(f, a.device))
            mid = {k: statistics.median(t) for k, t in took.items()}
            rows.append(dict(program=name, images=B, size=S, views=v.count, **{k: round(t, 5) for k, t in mid.items()}, ratio=round(min(mid['resample'], mid['slice']) / mid['ours'], 2)))
            print(rows[-1], flush=True)
    if a.json: json.dump(dict(rows=rows, kornia=kornia.__version__, rounds=a.rounds, machine=machine(a.device)), open(a.json, 'w'), indent=1)

if __name__ == '__main__': main()
