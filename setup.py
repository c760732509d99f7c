"Everything is read from settings.ini, so that nothing is said twice."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

root = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
readme = root/'README.md'

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    keywords=cfg['keywords'],
    python_requires=f'>={cfg["min_python"]}',
    packages=find_packages(include=['hjepa', 'hjepa.*']),
    package_data={'hjepa': ['weights/*.safetensors', 'weights/*.md']},
    include_package_data=False,
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split(), 'all': cfg['optional_requirements'].split(), 'browser': cfg['browser_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['hjepa=hjepa._modidx:d']},
    zip_safe=False,
)
