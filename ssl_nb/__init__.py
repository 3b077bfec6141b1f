"Self-supervised learning, explained and implemented in notebooks. Importing this alone tells timm the names of the small encoders."
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

# fastai compiles two functions in a way that torch 2.14 warns of; who uses ssl_nb can do nothing about it
warnings.filterwarnings('ignore', message='`torch.jit.script` is deprecated', category=FutureWarning)


def _tell(name):
    "Leave the name of an encoder with timm; the module that defines it is imported when one is built"
    def build(**kwargs):
        from ssl_nb.core import networks
        return getattr(networks, name)(**kwargs)
    build.__name__ = name
    sys.modules['timm.models'].register_model(build)
    globals().pop('__all__', None) # timm has set it


def _tell_all():
    if 'ssl_nb.core.networks' in sys.modules: return # which tells them itself
    for name in ('small_stem', 'small_resnet', 'small_vit', 'small_cnn'): _tell(name)


class _AfterTimm(MetaPathFinder):
    "Waits for the import of timm, which takes seconds, so that importing this package need not"
    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path) if name=='timm' else None
        if spec is None or spec.loader is None: return None
        load = spec.loader.exec_module
        def load_and_tell(module):
            load(module)
            _tell_all()
        spec.loader.exec_module = load_and_tell
        return spec


if 'timm.models' in sys.modules: _tell_all()
else: sys.meta_path.insert(0, _AfterTimm())
