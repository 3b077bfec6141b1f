"How long the pages of the methods take to read: a page that a reader can finish in one sitting."
import ast
import re

import nbformat
import pytest

from conftest import ROOT

LIMIT = 15  # minutes
PAGES = [ # those brought down to the limit so far
    'contrastive/18_clip', 'pretext/06_restoration', 'pretext/07_transformation', 'pretext/08_next_frame', 'pretext/10_sentence_order', 'autoencoders/03_contractive', 'autoencoders/02_denoising', 'autoencoders/01_autoencoder',
    'contrastive/01_infonce', 'contrastive/02_simclr', 'contrastive/03_moco', 'contrastive/04_moco_v3', 'contrastive/05_dcl',
    'contrastive/06_nnclr', 'contrastive/07_supcon', 'contrastive/09_byol', 'contrastive/10_simsiam', 'contrastive/11_barlow', 'contrastive/12_vicreg',
    'contrastive/13_wmse', 'contrastive/15_deepcluster', 'contrastive/19_collapse', 'contrastive/20_simcse', 'pretext/01_rotation', 'autoencoders/04_vae', 'autoencoders/07_bigan', 'autoencoders/06_gan', 'autoencoders/05_vqvae', 'evaluate/06_text_report',
    'masked/00_hidden', 'masked/00_left_to_right', 'masked/00_tubelets', 'masked/00_words', 'masked/01_mae', 'masked/02_simmim',
    'masked/03_beit', 'masked/04_maskfeat', 'masked/05_data2vec', 'masked/06_ijepa', 'masked/07_ibot',
    'masked/08_next_patch', 'masked/09_vjepa', 'masked/10_lewm', 'masked/11_bert', 'masked/12_electra', 'masked/13_gpt',
    'masked/14_llama', 'masked/15_diffusion_text', 'masked/16_sentence_pairs', 'masked/17_bert_encoder',
    'masked/00_frames', 'masked/21_wav2vec2', 'masked/22_hubert', 'masked/23_best_rq', 'masked/24_masked_frames',
    'contrastive/08_cpc', 'contrastive/21_speaker', 'contrastive/22_on_sounds', 'pretext/11_undistort', 'evaluate/07_verification',
    'data/10_mel', 'data/11_spoken', 'data/12_sound_views', 'data/13_sound_encoders', 'data/14_audio', 'transfer/01_speech_to_text',
    'transfer/03_segmentation', 'transfer/04_detection', 'transfer/00_finetune', 'transfer/02_label_efficiency', 'transfer/17_anomaly', 'transfer/18_bias',
    'transfer/19_new_data', 'transfer/05_text_tasks', 'transfer/14_tables', 'transfer/15_series', 'transfer/08_captioning', 'transfer/08_translation',
    'transfer/06_questions', 'transfer/09_retrieval', 'transfer/12_dna', 'transfer/16_medical',
    'app/02_runner',
    'evaluate/03_report',
    'data/06_video',
    'core/02_batch', 'core/02_cut', 'core/02_image_values', 'core/02_info', 'core/02_kinds', 'core/02_labels', 'core/02_loader',
    'core/04_networks', 'core/05_encoder_contract', 'core/05_encoder_fit', 'core/05_encoder_images', 'core/05_encoder_text', 'core/05_encoder_untrained', 'core/05_encoder_video', 'core/05_encoder_weights', 'core/05_encoders',
    'core/03_batch_crop', 'core/03_blur', 'core/03_colour', 'core/03_geometry', 'core/03_random_ops', 'core/03_token_views', 'core/03_views',
    'core/01_method', 'core/08_bars', 'core/08_callback', 'core/08_collapse', 'core/08_history', 'core/08_interrupted', 'core/08_learner',
    'core/00_common', 'core/04_masks', 'core/06_heads', 'core/07_measures', 'data/00_tables', 'data/01_files', 'data/01_folders',
    'data/01_parts', 'data/02_embedded', 'data/03_pixels', 'data/03_reading', 'data/04_images', 'data/07_pairs', 'data/08_running_text',
    'data/09_speech', 'data/09_world', 'evaluate/01_few_labels', 'evaluate/02_baselines', 'evaluate/04_plot', 'evaluate/05_results',
    'app/00_checks', 'app/01_folder', 'app/01_run', 'app/03_gallery', 'app/04_docs', 'app/05_embed', 'app/06_page', 'app/07_generate',
    'app/08_card', 'app/08_export', 'app/08_finetune', 'app/09_cli', 'tutorials/01_which_task', 'benchmarks/01_contrastive',
    'benchmarks/02_tiny_encoders', 'benchmarks/03_brief', 'benchmarks/04_neighbours', 'benchmarks/05_shakespeare', 'benchmarks/06_imdb',
    'benchmarks/07_masked', 'benchmarks/08_sounds', 'transfer/10_motion', 'transfer/11_sound_and_picture', 'contrastive/00_joint_embedding',
    'autoencoders/00_reconstruction', 'evaluate/02_verdict', 'app/06_alike', 'app/06_canvas', 'app/06_map', 'data/05_documents',
    'data/05_pieces', 'data/05_text',
    'pretext/00_tiles', 'data/03_ink', 'data/03_moving', 'data/03_scenes', 'app/02_score', 'app/03_compare',
    'pretext/05_colorization',
    'pretext/03_relative_patch',
    'pretext/04_inpainting',
    'pretext/02_jigsaw']


def words(text):
    "Words of a cell of prose; a formula, an address and a drawing are not read word by word"
    text = re.sub(r'<svg.*?</svg>', '', text, flags=re.S)
    text = re.sub(r'\$\$.*?\$\$|\$[^$\n]+\$', ' formula ', text, flags=re.S)
    text = re.sub(r'\]\([^)]*\)', ']', text)
    return len([w for w in text.split() if re.search(r'\w', w)])


def is_code(source):
    "Is this Python, and not an IPython command?"
    try: return bool(ast.parse(source))
    except SyntaxError: return False


def code_lines(source):
    "Lines of code that a reader reads: neither imports nor nbdev's directives"
    imports = set()
    if is_code(source):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Import, ast.ImportFrom)): imports |= set(range(node.lineno, node.end_lineno + 1))
    return len([i for i,l in enumerate(source.splitlines(), 1)
                if l.strip() and not l.lstrip().startswith('#|') and i not in imports])


def directive(cell, pattern): return bool(re.search(rf'^#\|\s*{pattern}', cell.source, re.M))


def pictures(cell): return sum(any(k.startswith('image/') for k in o.get('data', {})) for o in cell.get('outputs', []))


def to_read(nb):
    "The cells of a notebook without its section `Checked against`, which a reader may skip"
    skipped = False
    for c in nb.cells:
        if c.cell_type!='markdown':
            if not skipped: yield c
            continue
        for part in re.split(r'^(?=## )', c.source, flags=re.M):
            if part.startswith('## '): skipped = part.startswith('## Checked against')
            if not skipped: yield nbformat.v4.new_markdown_cell(part)


def reading_time(nb):
    "Minutes: 200 words or 30 lines of code a minute, 20 s a figure. Code that only draws and is folded is not read"
    minutes = 0.
    for c in to_read(nb):
        if c.cell_type=='markdown':
            minutes += words(c.source)/200 + len(re.findall(r'!\[|<svg', c.source))/3
        elif c.cell_type=='code' and not directive(c, 'hide'):
            drawn = pictures(c)
            folded = drawn and directive(c, 'code-fold:\\s*true')
            minutes += drawn/3 + (0 if folded else code_lines(c.source)/30)
    return minutes


def notebook(*cells):
    make = dict(md=nbformat.v4.new_markdown_cell, code=nbformat.v4.new_code_cell)
    return nbformat.v4.new_notebook(cells=[make[kind](source) for kind,source in cells])


def with_picture(source):
    image = nbformat.v4.new_output('display_data', data={'image/png': ''})
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, outputs=[image])])


def test_prose():
    assert reading_time(notebook(('md', 'word '*200))) == pytest.approx(1)
    assert words('Here $a + b$ is\n\n$$c = d + e$$\n\n| one | two |\n|---|---|') == 6
    assert words('See [the page](../core/01_method.ipynb#a-b).') == 3


def test_code():
    assert reading_time(notebook(('code', 'x = 1\n'*30))) == pytest.approx(1)
    assert code_lines('#| export\nimport torch\nfrom a import (b,\n    c)\n\ndef f():\n    return 1') == 2
    assert code_lines('%matplotlib inline\nx = 1') == 2
    assert reading_time(notebook(('code', '#| hide\n' + 'x = 1\n'*30))) == 0


def test_figures():
    assert reading_time(with_picture('draw()')) == pytest.approx(1/3 + 1/30)
    assert reading_time(with_picture('#| code-fold: true\n' + 'draw()\n'*30)) == pytest.approx(1/3)
    assert reading_time(notebook(('code', '#| code-fold: true\n' + 'x = 1\n'*30))) == pytest.approx(1) # draws nothing
    assert reading_time(notebook(('md', '![](a.png)'))) == pytest.approx(1/3)


def test_checks_are_skipped_exercises_are_not():
    cells = [('md', 'word '*50 + '\n\n## When\n\n' + 'word '*49 + '\n\n## Checked against\n\n' + 'word '*500),
             ('code', 'x = 1\n'*300), ('md', '### More'), ('code', 'x = 1\n'*300), ('md', '## Exercises\n\n' + 'word '*99)]
    assert reading_time(notebook(*cells)) == pytest.approx(1)


@pytest.mark.parametrize('page', PAGES)
def test_a_page_is_read_in_a_quarter_of_an_hour(page):
    took = reading_time(nbformat.read(ROOT/f'nbs/{page}.ipynb', 4))
    assert took <= LIMIT, f'{page} takes {took:.1f} minutes to read; leave out what is told twice, or proved a third time'
