"Hands to pip what settings.ini holds; pyproject.toml has the rest"
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

cfg = ConfigParser(delimiters='=')  # a classifier has colons
cfg.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
cfg, suffix = cfg['DEFAULT'], '_requirements'

setup(author=cfg['author'], keywords=cfg['keywords'].split(),
      classifiers=cfg['classifiers'].strip().splitlines(),
      install_requires=cfg['requirements'].split(),
      extras_require={k[:-len(suffix)]: v.split() for k, v in cfg.items() if k.endswith(suffix)})
