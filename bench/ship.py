"Make the weights that come with the package from a run: `python bench/ship.py runs/demo cifar10-cpu`."
import json, sys
from pathlib import Path
from hjepa.model import load, ship

run, name = Path(sys.argv[1]), sys.argv[2]
facts = json.loads((run/'run.json').read_text())
keep = {k: facts.get(k) for k in ('commit', 'dirty', 'train_seconds', 'images_seen', 'images_per_second', 'flops_per_image', 'torch', 'steps', 'seed')}
out = Path(__file__).parent.parent/'hjepa'/'weights'/f'{name}.safetensors'
out.parent.mkdir(exist_ok=True)
ship(load(run), out, run=json.dumps(keep))
print(f'{out.name}: {out.stat().st_size/2**20:.2f} MiB')
