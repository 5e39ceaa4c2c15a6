"""The golden values of test_pins.py. In a block a line at the margin says what was asked, those below it what came.

Keys and hashes are the same everywhere; losses held under `ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE` and under
`ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2` as well.
"""

import re


def blocks(text):
    """{what was asked: words}"""
    parts = [part.split("\n", 1) for part in re.split(r"\n(?=\S)", text.strip())]
    return {name: words.split() for name, words in parts}


MODEL = "8af765baba911642e624f620c1e303756a16b4063338a741ad8e0dd73eaf6077"
IDS = ["a-aae5bb9db3eb410f", "b-25931ac7809c941b", "a-bb90d89197765480", "a-343eade991564fa1", "b-f6b425ee0c082904"]
PROMPT = "7082a8efcdbf3fbf"

STEPS = blocks("""
split=by_source
    6f61e8f061ccf468e36d004d456e75b2db0d8b8504cdbe09097b3769298c05ed
    31a174a24c44a6c5affccf45317a2f11541938df3878249abfbf112b136247ff
split=all_at_once reference=initial
    b06b9e2ce7f5dda202c0281174891ce202e3d6dce5ac359bfe8539edc70d9369
reference=initial
    6f61e8f061ccf468e36d004d456e75b2db0d8b8504cdbe09097b3769298c05ed
    b42c86c25c42705073b8fab3bda2d40789402886682c4351c1cbd4d851788e41
reference=mixed reference.updates=2
    5149cee8f421e1aab0c81c105b063ab875c5324fb4e3add022b89e46388ec24a
    8e514f4fe1263533e287f02bc8260d1b507433100917a9b2da07225109bda7e0
reference=average
    6f61e8f061ccf468e36d004d456e75b2db0d8b8504cdbe09097b3769298c05ed
    491a788ef64de46cf6c199a7381cad71b35dde31a1e7b46ced10d787a16a35ed
reference.placebo=mean_shift
    db2dd77b636d808c956de03623132c042f2741bc64198f35568235c9a43f4efe
    d3d4748f3bae994958f885aee9759c236334cd1ab01b5187fd766165aa650df0
tune=lora
    aa1bdafe73a6eba7eae95791bf5ab5ecb457da2bbad5722f1fa89995239b7fed
    dfd8fe5547587be4e311c20be76977c9a65b64ce1d63aa8ea16351dd31d6045d
tune=lora tune.between=stack tune.quantize=4bit tune.modules_to_save=[lm_head]
    04003056f224617422f3afb3bdc8f04889da27e846dc2d502dc0a40eea6c790d
    e793ed6afd304cdb12945b1e492a445040dabf5ffa2c38a7f8510a856347e6bd
loss=odpo
    650ad1618313dad5af62e440f55f724592a5dc018b198dc2df96b53b26dd4eee
    ddc00dd8d20df9126910f1d704ec0401365b58170a11e9b169227fbf5e8f95ca
loss=simpo reference=none deepspeed=zero2
    74ad4be1c897c9fcf783b32ac39827bc09acf44fd4e932b4a36e0242c877a4f2
    cf5a9978306681591db5dcf3caa1f97fd43cf68d97ec2d5da88aaea5390c3b6a
probe.every=2
    991c2eef29f1aba2aa36d65b89ce96d7754f57b82c183b54387f077f2818b370
    4cff4df091ad6afc22eee7a6cb74aafd2710fd99a9b8c1b8ecfd08f5db1ded41
optim.schedule_over=run optim.moments=carry
    387fed6228cad3a2868df30fa59453b5cfe3c536a598de6ba44c9c2697d2dcff
    7278be0af85206a3dcb32b10854635bafa8a1ec44b59a1c901c0f404e6abd8a7
+steps.2.optim.lr=1e-4
    6f61e8f061ccf468e36d004d456e75b2db0d8b8504cdbe09097b3769298c05ed
    e1dc1381dd0290cf482f17b5e5c05e8e0d07c0bcb8360a6244d2846d1133f457
precision=bf16 save_dtype=bf16 launch.ranks=2 launch.threads=3 launch.attention=plain launch.compile=true
    05234a2eb6f111a401b7c574726e53321303168db1843a67dfed48f2bd3ffb61
    7d9874dc8e2634c5af6ea728e21d97df7fb46ce03bedda4c8a343478fca90e4e
optim.epochs=2 optim.schedule=cosine optim.warmup=0.2 optim.weight_decay=0.1 optim.clip=0 optim.betas=[0.8,0.99]
    7b9a0c8425f25d21364fb0a987c4d57c3c3671cb866bfd7d15c0140a59f39663
    8138636f0f2394f78f6c3e6d48fbb490556996373bf966662b8244677bf1d302
split=random seed=1
    44e7f3ef0042a13af884dff2277487a33d7c9d9593a63f631be40000038a95e4
    2f1ddf4bbbf58088e695a2846b3090445e37142a43fca63ea1d4541c523b3171
split=stratified
    74ef45d76ffd5672726bb726e672451abf627297519c697417e5b21779b568dd
    0a7f2f1cacab89dd99c90179a9a2bbb377861518269196824552af90282b679a
split=repeat split.num=2 start=initial
    b06b9e2ce7f5dda202c0281174891ce202e3d6dce5ac359bfe8539edc70d9369
    39c528785da0463cea0e18672f7294dd8c47988db362fdc388a920b0f53e68c2
split=all_at_once split.keep=0.5 score=validation_loss score.repeats=1
    df5119255736b45e6aeb3e6610bea9b78e113ac80958eab555d52bb0b6181819
    a1a3967ad6fe0f47b9cce9ab5828e88ec68d982876f2c73790fc7643db17bdc0
experiment=smoke
    cb33bad487dea061fdb5c6e6822552c9c893cd5300945c8d8f0c2bf6ff34815e
""")
# Of every chunk the hash of its ids, then that of its tokens.
SPLITS = blocks("""
split=by_source
    2a9095eeb9774114643b03f3593904d7fe4c171b528d04074d637b0e387abf07
    f571a2c94d822429e6b0ae9606b94180674b1f4f132ceda7a5097ea62721066f
    cad63d2343d6d5b652d35751c154c40e4546a2b963af6d658ca90c7c344cc13c
    2b20fb5f46150215e00984106ca2a7926fcdef67d4d69ba70ccba2ddb76a0b79
split=random
    a9e76ed6a1f67bc52a8a149d44e4abb7f7f63200960b2a8cc1c9272101329094
    31756f1e4edaeb27856ae1ca32c1ca6b7203e43b00f12dae16778ea6f7416069
    232bf3df8793588460567177ff10b448104412624b55c42baaabb0860548b539
    7559be46c5097027440e713f886d0370320c3db7ba2f3551a25a0b816e4e6919
split=stratified
    9ef5f3d8bcef6358737dca4209cf94716c1705895ebf53918c73fa4a4f9d774b
    662316ead5c27cbe9914eeecd5276e2d6128739395a36fbc1351cce6965b419c
    984a6d5e214cd5ff3aff7e16c93e7360f0779343d513fed465a28815cd55046d
    1d4a1fdc257bb6918f020121c5add8418532184a51ecb97a550f26df00866906
""")
MADE = blocks("""
logprobs
    4c14205cb6fc589803e25669997483d37b5968a5c8d74d0e051619f9d8742766
    9337412b94b0de34d92f01977353b84ad5ffd37643aa12f4fa947cb13387eb4e
    a806c8913c5fa83a14ee72f6788419a3f5c78387b8cd44610a062aed016a1df6
    b4d2b897127a98e84c40ab22c84b2d26a6515b52fe659f4710fb45ed83b890e3
    c035d9c946cca3a546f69647c819a15cac790275b3e561b53bc1f446c8bec205
    c147805a7bea6f342e16308b76c51d6dfd548024fe99b397b577194209e8a165
    c6814ee42361d6fcd117c954c56f6e4b0dcbc441d718232b9c13654c5a9f3bbb
    cd1116333164364f275e9f884a94c0b10c18f2f522b959aaf3344bd4905f9ce4
    d8e66e7e4db8629456920c1d12f1f6ed7ea74ed8292a879f0fa7e23a1201e487
    e8fae95693f1c9cadadd7f7db53a8954dd5577313edc0a8e85869126da657efc
answers
    16dec12141e6bde54928837f604dbca5f9f8be9a882cedbc3646b83e9961a1f2
    20f3343efe231eb05dad898f03108ee2e8a47f9d8fe414edcd748f45bc362f56
    357b8371f54823a3ae01419725b1e60871c323cfa0dd9a16ffbd99e436cbaf95
    5d4c54c1fc1aa9075b1343a4f5c56e7e21e9acf10613cf0569e6f617b1528e6d
    8da8c671c30926acbeccf436e0c9fec53af61e047604a39e45efe93b81a7c797
    eb10a36aa0c0439914903d87bb7baa5705db81f5bd286b5812d4a0c770b08bc0
evaluation divergence
    591c9f3f8952107f783345b447cdcd22f7e6980fa61a3811d682548606bba1f4
    5b28ba64a46d81b8d3204dda84850a3da7d1a6209e745e1f070c6197b830b189
    73e66f3d8b1c2c3c6c4fdbb3c58563a6fb620b24e8fdccca974009ef840f8588
score
    4e60e7e9422a62a71ef1488b5d1846896f3e662cd04163a431c51eb12cb5f6bc
step
    91b9906c074c55c75bf0fbdc4190ab70cc15136e58594e3e6f596f99dcf2a944
    d2a7648d349bb0fe31391ed6c1b328f5a71c9c1f4919c60ce044b45df58c77c1
""")
ASKED = blocks("""
logprobs
    9337412b94b0de34d92f01977353b84ad5ffd37643aa12f4fa947cb13387eb4e
evaluation lab
    6e3a8830803d63c536b250e0abaa8853c09209144fc0870de2d828740eb397e4
    cbc1c2d0c83ab0bc5d6d901abe4c58b4483251265fe3d8f2fed0553706e1e6db
evaluation best_of_n
    39eb967a3ca411b134c5e57b016017325502451fb32e452db3e73e391334eeae
evaluation h4
    68695f6e5edf2061b1b44df9aa1020aa0a97dc6e930ac670e32cfc213d3f0e01
evaluation benchmark
    37227ea8af2285707ec34bdc59c80281ef00de95833f532bd27d13d2d0a0e058
answers
    2938a6ece0418f8550a890cb6b63605c58a2a095227aa96317a53c9c92cdc5cc
evaluation divergence
    47245a1e94345bd1420e8204213801cc35eecab5adfa6445559d72060df443eb
score
    9f3a1105c3d0b0109f014141b88d82e7eb3573781207903f7c7edb0115f57e3f
mean
    b59944fe693906d4f3043a3807a2bd8064b9b68adfabbc3d06968c11b1e60cad
rounded
    2335ac8fd512cf63541def103e6788835957eb9a9e98182e29984941e67c7a5e
model
    5734e0dda3c076c1337b7e178334d994b686dfff4c0dcf7f2c1d6eaf2d835123
pairs
    037d8367c6619c4e4fe0e629ede01133914a2030ea926dafb3be2e90f908b860
""")
DETERMINANTS = """
answers decoding device precision prompts template tokenizer torch transformers weights
evaluation answers device initial precision suite torch transformers weights
evaluation batch_size limit lm_eval local num_fewshot suite tasks tokenizer weights
evaluation batch_size limit lm_eval local suite tokenizer weights
evaluation exam initial suite torch transformers weights
evaluation exam suite torch transformers weights
logprobs attention compile device precision rows weights
mean weights
model lab seed
pairs initial settings
rounded format model
score attention device precision random_model rows
score device precision reward_model rows
step attention compile deepspeed device loss optim precision probe ranks rows save_dtype seed start threads tune windows
""".strip().splitlines()
LOSSES = blocks("""
split=easy_to_hard probe.every=2
    0.69314718 0.62073714 0.53972697 0.77966340 0.69314718 0.64813495 0.68290305 0.61620009
reference=mixed reference.updates=2
    0.69314718 0.65929782 0.68561518 0.65640068 0.69314718 0.67440516 0.67288804 0.76261322
tune=lora
    0.69314718 0.65524143 0.69339210 0.64942133 0.69314718 0.67815042 0.63546574 0.71646221
""")
NAMES = blocks("""
run
    .lock answers answers/decoding.json answers/run-M_0.alpaca_eval.json answers/run-M_0.mt_bench.jsonl
    answers/run-M_1.alpaca_eval.json answers/run-M_1.mt_bench.jsonl answers/run-M_2.alpaca_eval.json
    answers/run-M_2.mt_bench.jsonl config.yaml data_report.json done manifest.json metrics.jsonl pairs.parquet
    split.json steps steps/1 steps/2 summary.json trajectory.parquet
store
    answers evaluation locks logprobs score step
steps/1
    chat_template.jinja manifest.json model.safetensors probes.parquet reference.parquet train.json
config.yaml
    T data data.columns data.held_out data.held_out_share data.lab data.lab.num_demonstrations data.lab.num_held_out
    data.lab.num_items data.lab.num_prompts data.lab.num_samples data.lab.prompts data.lab.sources data.max_tokens
    data.name data.nominal data.on_bad_row data.on_long data.revisions data.seed data.source_from data.template
    data.template_date data.train deepspeed deepspeed.offload deepspeed.stage evaluate evaluate.generate
    evaluate.generate.batch_size evaluate.generate.file evaluate.generate.max_new_tokens evaluate.generate.name
    evaluate.generate.seed evaluate.generate.temperature evaluate.preference evaluate.preference.name launch
    launch.attention launch.checkpoint_minutes launch.compile launch.device launch.ranks
    launch.recompute_activations launch.threads launch.tokens_per_pack loss loss.beta loss.label_smoothing loss.name
    model model.device model.lab model.lab.heads model.lab.layers model.lab.width model.lr model.name
    model.parameters model.path model.revision model.seed model.sft model.template model.trust_remote_code optim
    optim.betas optim.clip optim.epochs optim.lr optim.moments optim.pairs_per_update optim.schedule
    optim.schedule_over optim.warmup optim.weight_decay plan precision probe probe.every record record.every
    record.mode record.project record.wandb reference reference.name reference.placebo save_dtype score score.model
    score.name seed split split.disjoint_prompts split.equal split.keep split.level split.measure split.name
    split.num_chunks start steps tune tune.name
manifest.json
    arm choices choices.split command git git.commit git.diff git.dirty machine machine.cores machine.cpu machine.gpus
    machine.system model_key run seed steps steps.gamma_ref_mean steps.key steps.num_pairs steps.reused steps.sources
    steps.sources.* steps.start steps.t steps.windows steps.windows.first_update steps.windows.gamma_ref_mean
    steps.windows.num_pairs steps.windows.num_updates steps.windows.weights steps.windows.weights.*
    steps.windows.weights_hash sweep versions versions.datasets versions.deepspeed versions.peft versions.python
    versions.sdpo versions.tokenizers versions.torch versions.transformers
split.json
    chunks dropped receipts receipts.chosen_longer receipts.chunk receipts.hash receipts.mean_chosen_tokens
    receipts.mean_rejected_tokens receipts.mean_score receipts.mean_tokens receipts.num_pairs receipts.sources
    receipts.sources.* score score.model score.name score.tokens score.weights sources sources.* sources.*.gamma
    sources.*.gamma.high sources.*.gamma.low sources.*.gamma.n sources.*.gamma.value sources.*.gamma_per_token
    sources.*.gamma_per_token.high sources.*.gamma_per_token.low sources.*.gamma_per_token.n
    sources.*.gamma_per_token.value sources.*.random_model sources.*.random_model.high sources.*.random_model.low
    sources.*.random_model.n sources.*.random_model.value sources.*.score sources.*.score.high sources.*.score.low
    sources.*.score.n sources.*.score.value sources.*.score_mean sources.*.score_mean.high sources.*.score_mean.low
    sources.*.score_mean.n sources.*.score_mean.value sources.*.shorter sources.*.shorter.high sources.*.shorter.low
    sources.*.shorter.n sources.*.shorter.value warnings
data_report.json
    dropped dropped_rows files files.dropped files.file files.layouts files.layouts.plain files.pairs files.rows
    files.sha256 files.side sources sources.held_out sources.held_out.* sources.held_out.*.chosen_chars
    sources.held_out.*.chosen_longer sources.held_out.*.duplicates sources.held_out.*.pairs
    sources.held_out.*.prompt_chars sources.held_out.*.prompts sources.held_out.*.rated
    sources.held_out.*.rejected_chars sources.train sources.train.* sources.train.*.chosen_chars
    sources.train.*.chosen_longer sources.train.*.duplicates sources.train.*.pairs sources.train.*.prompt_chars
    sources.train.*.prompts sources.train.*.rated sources.train.*.rejected_chars tokens tokens.held_out
    tokens.held_out.bos tokens.held_out.max_tokens tokens.held_out.notes tokens.held_out.on_long tokens.held_out.sources
    tokens.held_out.sources.* tokens.held_out.sources.*.answers_behind_prompt tokens.held_out.sources.*.answers_cut
    tokens.held_out.sources.*.boundary_mismatches tokens.held_out.sources.*.chosen_tokens
    tokens.held_out.sources.*.dropped_empty tokens.held_out.sources.*.dropped_identical
    tokens.held_out.sources.*.dropped_long tokens.held_out.sources.*.dropped_template tokens.held_out.sources.*.kept
    tokens.held_out.sources.*.long tokens.held_out.sources.*.pairs tokens.held_out.sources.*.prompt_tokens
    tokens.held_out.sources.*.prompts_with_bos tokens.held_out.sources.*.rejected_tokens
    tokens.held_out.sources.*.responses_with_stop tokens.held_out.sources.*.specials_removed
    tokens.held_out.sources.*.truncated tokens.held_out.stop tokens.held_out.template tokens.held_out.template_date
    tokens.train tokens.train.bos tokens.train.max_tokens tokens.train.notes tokens.train.on_long tokens.train.sources
    tokens.train.sources.* tokens.train.sources.*.answers_behind_prompt tokens.train.sources.*.answers_cut
    tokens.train.sources.*.boundary_mismatches tokens.train.sources.*.chosen_tokens tokens.train.sources.*.dropped_empty
    tokens.train.sources.*.dropped_identical tokens.train.sources.*.dropped_long tokens.train.sources.*.dropped_template
    tokens.train.sources.*.kept tokens.train.sources.*.long tokens.train.sources.*.pairs
    tokens.train.sources.*.prompt_tokens tokens.train.sources.*.prompts_with_bos tokens.train.sources.*.rejected_tokens
    tokens.train.sources.*.responses_with_stop tokens.train.sources.*.specials_removed tokens.train.sources.*.truncated
    tokens.train.stop tokens.train.template tokens.train.template_date
summary.json
    headline headline.n headline.name headline.value initial initial.eval initial.eval.* initial.eval.*.high
    initial.eval.*.low initial.eval.*.n initial.eval.*.value reused_steps seconds steps steps.eval steps.eval.*
    steps.eval.*.high steps.eval.*.low steps.eval.*.n steps.eval.*.value steps.first_loss steps.gamma_ref_mean
    steps.gamma_ref_negative_share steps.lambda_mean steps.lambda_std steps.last_loss steps.num_pairs
    steps.reference_leverage steps.reused steps.seconds steps.sources steps.sources.* steps.t steps.tokens_per_second
    steps.utilisation trained_steps
steps/1/train.json
    entries entries.chosen_logp entries.grad_norm entries.lambda_mean entries.lambda_std entries.loss entries.lr
    entries.margin entries.pairs entries.rejected_logp entries.reward_accuracy entries.seconds entries.tokens
    entries.update speed speed.tokens_per_second speed.utilisation windows windows.first_update windows.gamma_ref_mean
    windows.num_pairs windows.weights_hash
answers/decoding.json
    batch_size max_new_tokens seed temperature
metrics.jsonl, train
    chosen_logp grad_norm kind lambda_mean lambda_std loss lr margin pairs rejected_logp reward_accuracy seconds t
    tokens update
metrics.jsonl, step
    first_loss gamma_ref_mean gamma_ref_negative_share kind lambda_mean lambda_std last_loss num_pairs
    reference_leverage reused seconds sources sources.* t tokens_per_second utilisation
metrics.jsonl, eval
    eval eval.* eval.*.high eval.*.low eval.*.n eval.*.value kind t
metrics.jsonl, answers
    answers answers.answers answers.dataset answers.id answers.turns decoding decoding.batch_size
    decoding.max_new_tokens decoding.seed decoding.temperature kind t
measures
    generate/ended generate/kl generate/tokens preference/a/gamma preference/a/ranking_accuracy
    preference/a/reward_accuracy_initial preference/a/shorter_accuracy preference/b/gamma preference/b/ranking_accuracy
    preference/b/reward_accuracy_initial preference/b/shorter_accuracy preference/chosen_logp preference/gamma
    preference/log_ratio_chosen preference/log_ratio_rejected preference/margin_initial preference/margin_step
    preference/ranking_accuracy preference/rejected_logp preference/reward_accuracy_initial
    preference/reward_accuracy_step preference/shorter_accuracy
""")
COLUMNS = blocks("""
trajectory.parquet
    id source held_out chunk model t update role chosen_logp rejected_logp seen
pairs.parquet
    id source held_out chunk score prompt_tokens chosen_tokens rejected_tokens chosen_rating rejected_rating
steps/1/reference.parquet
    id chosen rejected
steps/1/probes.parquet
    id role update chosen_logp rejected_logp trained
""")
