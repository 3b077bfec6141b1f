"Everything the package says of itself is read from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read(here/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
readme = here/'README.md'

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    author_email=cfg['author_email'],
    license='Apache-2.0',
    url=f"https://github.com/{cfg['user']}/{cfg['repo']}",
    packages=find_packages(include=['ssl_nb', 'ssl_nb.*']),
    include_package_data=True,
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={k: cfg[f'{k}_requirements'].split() for k in ('dev','transfer','export')},
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': ['ssl_nb=ssl_nb._modidx:d']},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
                 'Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
)
