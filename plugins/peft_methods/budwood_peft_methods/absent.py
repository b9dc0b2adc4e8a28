"""PEFT's types that are no strategies here: why, and what to use instead. The entry point group is budwood.absent."""

_PROMPTS = (
    "trains virtual tokens before the inputs instead of changes of modules; packed rows, positions, labels and prefix "
    "caches would all have to know of them: use lora, or ia3 if the adapter must be as small"
)

adamss = (
    "chooses its subspaces by clustering the weight's singular vectors, which a plan cannot rehearse: use adalora, "
    "which divides a budget of ranks too"
)
adaption_prompt = "is tied to the attention classes of a few models: use lora, or ia3 if the adapter must be as small"
beft = (
    "trains biases, which cannot be merged into linears that have none: use glora with weight: none, coupling: none, "
    "bias: vector on a base with biases, or ia3"
)
bone = "has become miss in PEFT, where `variant: bat` is what Bone called bat: use miss"
cartridge = _PROMPTS
cpt = _PROMPTS
deft = (
    "starts as the base only up to the rounding of a product with its weights: use lora, or oft, which starts as the "
    "base exactly"
)
frod = (
    "needs a decomposition of all weights of a kind together, unquantised, before it can start: use vera, which "
    "shares projections as well"
)
lily = (
    "mixes its matrices by an average over all tokens of a batch, so that an answer would depend on the other rows of "
    "its batch: use lora or gralora"
)
multitask_prompt_tuning = _PROMPTS
osf = (
    "trains parts of the weights themselves, so that its file is as large as they are and fits no quantised base: use "
    "lora with the initialisation pissa"
)
p_tuning = _PROMPTS
poly = (
    "needs the number of a task with every example, which data has no field for: train one lora for each task, and "
    "join them with `budwood adapter combine`"
)
prefix_tuning = _PROMPTS
prompt_tuning = _PROMPTS
psoft = (
    "finds its directions anew from the base's weights whenever it is loaded, so that its file means another update "
    "on a quantised or rounded base: use oft, or tinylora, which saves them"
)
pvera = (
    "draws random numbers from a generator of its own in every forward pass, which a resumed run could not repeat: use "
    "vera"
)
shadow = (
    "adds a second network beside the decoder's blocks, which is no change of its modules: use lora, or train a "
    "smaller base with distillation"
)
unilora = (
    "has no start at the base, since all of its matrices are made of one vector, which has no gradient at zero: use "
    "vblora or vera"
)
xlora = (
    "weighs adapters anew for every token, after a pass without them, which a batch with an adapter for each row "
    "cannot hold: train one lora, or join several with `budwood adapter combine`"
)
