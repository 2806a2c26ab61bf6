"""From a checkpoint to a model that others can run: download, PEFT layout, merge, proof, card,
upload.

`download` fetches the adapter through the SDK, `peft_layout` names its tensors as PEFT does,
`merge` adds it to the base, `verify` proves the sum, `card` describes it, `hub` uploads it,
`versions` keeps what was deployed and goes back.
"""
