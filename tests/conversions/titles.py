"""How the page names the families of ``family_models.FAMILIES``."""

TITLES = {
    "roberta": "RoBERTa",
    "distilroberta": "DistilRoBERTa",
    "camembert": "CamemBERT",
    "xlm-roberta": "XLM-RoBERTa",
    "bert": "BERT",
    "minilm": "MiniLM",
    "longformer": "Longformer",
}
