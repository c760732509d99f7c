"Make the weights that come with the package from a run: `python bench/ship.py runs/demo cifar10-cpu [encoder.read=4 ...]`; what follows the name changes how they are read."
import json, sys
from pathlib import Path
from hjepa.cli import overrides
from hjepa.config import recipe
from hjepa.model import load, ship

run, name, model = Path(sys.argv[1]), sys.argv[2], load(sys.argv[1])
model.recipe = recipe(model.recipe, **overrides(sys.argv[3:]))
facts = json.loads((run/'run.json').read_text())
keep = {k: facts.get(k) for k in ('commit', 'dirty', 'train_seconds', 'images_seen', 'images_per_second', 'flops_per_image', 'torch', 'steps', 'seed')}
out = Path(__file__).parent.parent/'hjepa'/'weights'/f'{name}.safetensors'
out.parent.mkdir(exist_ok=True)
ship(model, out, run=json.dumps(keep))
print(f'{out.name}: {out.stat().st_size/2**20:.2f} MiB')
