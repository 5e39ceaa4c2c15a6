"""The golden values of test_pins.py. In a block a line at the margin says what was asked, those below it what came.

Keys and hashes are the same everywhere; losses held under `ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE` and under
`ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2` as well.
"""

import re


def blocks(text):
    """{what was asked: words}"""
    parts = [part.split("\n", 1) for part in re.split(r"\n(?=\S)", text.strip())]
    return {name: words.split() for name, words in parts}


MODEL = "7d4870011d77df4534951ce4a3e3cbd00899628d58707c8b35945e93e27e77bf"
IDS = ["a-aae5bb9db3eb410f", "b-25931ac7809c941b", "a-bb90d89197765480", "a-343eade991564fa1", "b-f6b425ee0c082904"]
PROMPT = "7082a8efcdbf3fbf"

STEPS = blocks("""
split=by_source
    797330f04b0eafe67e04f47a5ada6c62f97722df99b2e26a2c96222c74a7c5cc
    e01aa63252ec3ccd9c0dcbfdbae1fdfa57ef681c56e6eba0ee266ac85a5aca24
split=all_at_once reference=initial
    88b0a43f2a75cf1af154d3d91f8d89fcd3eca271b8429e539f648b03603205f4
reference=initial
    797330f04b0eafe67e04f47a5ada6c62f97722df99b2e26a2c96222c74a7c5cc
    ea53b640a8e5a8a78ab1f338992e9d2abc3a3a401d345ea7c49d593afe107ccb
reference=mixed reference.updates=2
    98d55df4381b7007e6e927a1a3ec901c73fd16081e5b3099d5f8f9bf31d5773e
    771f4dd933ab9e678cd8e4d10e9d92f0ae1f17096c364b38ae69fa21b2475a0e
reference=average
    797330f04b0eafe67e04f47a5ada6c62f97722df99b2e26a2c96222c74a7c5cc
    8a175a5e8cdf467a5158c7b880824834e259bf3d929171bdde61ff672d8d7fef
reference.placebo=mean_shift
    d2aa615a26ae821e3091ab237675990a95ec0112804c736ec2d8ca355fbb51dd
    0fb0a3f4b5dff5f6e2d17d73d74473d5b61d490dca3fcf75779f32d32905df50
tune=lora
    676e13d8a00890b8c4ce1c9dfc9678343403166143d981e20796922ffe4d20ef
    195ec1deb30b29fc56639dc298be1a0c396e43368abc8571faedcef6ae15bef9
tune=lora tune.between=stack tune.quantize=4bit tune.modules_to_save=[lm_head]
    71e3e7e17e77d9156a17dc36d9422bf2e6d217338c81c321ca5c456086bc33be
    4a26277c990fe87c6ce9f5a62538cda16642145833ad20e89a710b21e8a22baf
loss=odpo
    6735cfcbbe498df73d7aec7b9841e5185133d827cf80e9d79573375eee0a0c03
    57193efc7259686699174bbe9cbb27003b537beb60de1a91c8c9540005f3f247
loss=simpo reference=none deepspeed=zero2
    39db219ab48f54b3ddf209d33c18bed3f149c3c7d2ed4af7312fdc6aeacae0ca
    2f206f01abfda5a836ff144ace16f454e0c993da4dd6b4865581890deb69c244
probe.every=2
    a8ec5a065485e56ff6f4ea56b701fbbdb2f7868dccf076a0865a9df163712bc5
    937b704dbb54fa19acf3904c5fa00ba43f2dd2859cd045dd938150341980c316
optim.schedule_over=run optim.moments=carry
    89e1db453781414a0c7891a6a7bdc6cd88e369ce6f40664344369c2b49b5c5aa
    a7dc7e625034262ec555a60d83a58960350e0e29c7b3d39737c8ffa6f08de12c
+steps.2.optim.lr=1e-4
    797330f04b0eafe67e04f47a5ada6c62f97722df99b2e26a2c96222c74a7c5cc
    0a331ce7f765f08dd787e2c3a60966adbfa69fd9d61c69d81108b0b6e79628ac
precision=bf16 save_dtype=bf16 launch.ranks=2 launch.threads=3 launch.attention=plain launch.compile=true
    43cd0aca638dc82e791330024fea5ce48b260fc7f96a805c848e73150c4289fe
    20c742466bab4fa12a08b8f05a4bf76cbf9e59abdad8307cefefdbcae83fe484
optim.epochs=2 optim.schedule=cosine optim.warmup=0.2 optim.weight_decay=0.1 optim.clip=0 optim.betas=[0.8,0.99]
    6c973181541f433060690370fae845d12b5c169f371913a243b8b4df34d0cb29
    09fb5f1198de8a7dd5d6996bc49a32109b865ec3916696d67b99feeccf832231
split=random seed=1
    3b7ad198851ddb11596754249058e29f83d2ae9b2c61b4811e6b5066daad6b03
    4f18d7817dd41448d88c23b56a61147153f1633606c29af84c27f00b9d6d9a79
split=stratified
    c05b1bfc77bd16ecf63e38f276558b5e4b0e36b59efb2fd088ae23ba4c6f979e
    4226cea30c53bae34039ddaa506cdd57c025d336bda2b47d093d152e7e773296
split=repeat split.num=2 start=initial
    88b0a43f2a75cf1af154d3d91f8d89fcd3eca271b8429e539f648b03603205f4
    69aedb45fd754424d5b2802f8ba17719e652b8e8c6db649ae8970120564bc8e8
split=all_at_once split.keep=0.5 score=validation_loss score.repeats=1
    93a8774e8e90ed5371f186b04beb271dd68e0ad44f3992df2097c69425046358
    ca32a569a9835520a27add869d3ebc32a74f5fdde452b2783bea2273267d3bd7
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
    067687df2f72561b22c8d959611f20a25e3412bfcb69fe76e12b77fbbbb48e7c
    113e28bbad71332f22f5d4e7d0a6bc82484a4d3725b2b8bccabfdd081a821501
    455f2923691199945b58c4772f5cce790a0a8ab0d596df8f9db9af01052542b3
    9a4c325959b407f474115edf819f6b5b5e893b4746476d3219318c1179701f39
    aa9b9441f134fa972aba5dad5105f49ec4a99d684766057ee0d5a2e6b643dacd
    ce9e2eb53ae21160ed267c103cc92d8574c338e15e91f580d8d470374207d079
    d04042773bcbc33df593ed80e50a3e372ec020c4fc3857723f309c7b759f14ef
    e6467dc7e994e0c91631b4dbff745b532cbf8bc98468bebe8d33095212c8ac97
    f0f919c8bc0a5e2e3330c8ea8de1609957db9114667bfb4f776e69b41b39866b
    fbbb9b9885267fada480058524cda8181e4c998f663f36d2a9802bef9fe2a650
answers
    1747c6b3ed0b0dac1ec891f15b8d61ebabeb34152f47a96e60b6ad603be0ed38
    195b7d435c4f824e82261315a9bc6c44cf23318dfaa0594c0a60afcbcc059efe
    217e54b1b07192d09bfe24ea5e8c51a24e88c9a0aeb168498eae26c8b7c9e48c
    91fe2e47437224dbc27be467999fe258bc242bf1e3bb66c5754b7232312b40c0
    b95d57f4334eebc8f3e9010893c9d00e2c4d012d73d93d2da2d2fbf8b0691844
    ef054d163dc31ea44f77e4b420588ed6de7f1ef496f53bc1413fc332134591fd
evaluation divergence
    501e618f73f5ec4d866e6f2a9eef278a69f0bde98e9f9c81d8a4947e2a843e86
    539c1637cde934c375c7a955e79bf36291417955500a9a383d57025c40896f0f
    6251621d641e64533984ce6f2aa0d5a4a77b7c05af85be92a2f9e5aad77e2e15
score
    4e60e7e9422a62a71ef1488b5d1846896f3e662cd04163a431c51eb12cb5f6bc
step
    3f8b9d9424a8a162441f9957d90f4fbdb10ab928924a41a33dd682831fed2e11
    c499f99014f41cf36641e082f3a90ddf766e0f151faed66c849be091258cc43d
""")
ASKED = blocks("""
logprobs
    113e28bbad71332f22f5d4e7d0a6bc82484a4d3725b2b8bccabfdd081a821501
evaluation lab
    b0c5e87ae22a546a2c5ae01a445e0b99a4e1e8fbaa45909b1f0780b83f09c32c
    e127d73cacd3f153bd2fc5b08ba1cce9c525d074261f433cc970f956ac91cc84
evaluation best_of_n
    82bc427aef0ca0139fa65cc98a1ed5014de2418937b2faba15034bb26172ba0a
evaluation h4
    573b94e7481ee642000583aeebbdb7d8d329f131ce17d4bde78a6de9106e6182
evaluation benchmark
    a1b3d1d5d049abaf8032f938bec6ebe1948fa8fdd8127c81fa21111e9fbb80a4
answers
    2938a6ece0418f8550a890cb6b63605c58a2a095227aa96317a53c9c92cdc5cc
evaluation divergence
    d88662095e38a3dbf5661859ac72042d5fd8bb7b8195fcc0611f1fbe480269c2
score
    ef87347485326567a0757fa172bbba7a2f32ae7eb0d44bf7f488f0319717fa95
mean
    16ec1250fb0426079f57bb519b9a7209c48b5c0e70b3306a88d1f7ed02853311
rounded
    0ef27e43f489d1f3e25e88a0cf336831532746b7d84d90caa7f6e43ecb679ac8
model
    5734e0dda3c076c1337b7e178334d994b686dfff4c0dcf7f2c1d6eaf2d835123
pairs
    037d8367c6619c4e4fe0e629ede01133914a2030ea926dafb3be2e90f908b860
""")
DETERMINANTS = """
answers decoding device precision prompts template tokenizer torch transformers weights
evaluation answers device initial precision suite torch transformers weights
evaluation asking batch_size device limit lm_eval local precision ranks shares suite tasks tokenizer weights
evaluation batch_size device limit lm_eval local precision shares suite tokenizer weights
evaluation exam initial shares suite torch transformers weights
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
    T data data.columns data.held_out data.held_out_limit data.held_out_sets data.held_out_share data.lab
    data.lab.num_demonstrations data.lab.num_held_out data.lab.num_items data.lab.num_prompts data.lab.num_samples
    data.lab.prompts data.lab.sources data.limit data.max_tokens data.name data.nominal data.on_bad_row data.on_long
    data.revisions data.seed data.source_from data.template data.template_date data.train deepspeed deepspeed.config
    deepspeed.offload deepspeed.stage evaluate evaluate.generate evaluate.generate.batch_size evaluate.generate.file
    evaluate.generate.max_new_tokens evaluate.generate.name evaluate.generate.per_source evaluate.generate.preset
    evaluate.generate.seed evaluate.generate.temperature evaluate.generate.top_p evaluate.preference
    evaluate.preference.name launch launch.attention launch.checkpoint_minutes launch.compile launch.device
    launch.kernels launch.memory launch.nodes launch.ranks launch.recompute_activations launch.threads
    launch.timeout_minutes launch.tokens_per_pack loss loss.beta loss.label_smoothing loss.name model model.device
    model.lab model.lab.heads model.lab.layers model.lab.width model.lr model.name model.parameters model.path
    model.revision model.seed model.sft model.template model.trust_remote_code optim optim.betas optim.clip optim.epochs
    optim.lr optim.moments optim.pairs_per_update optim.schedule optim.schedule_over optim.states optim.warmup
    optim.weight_decay plan precision probe probe.answers_every probe.every probe.file probe.max_new_tokens record
    record.every record.mode record.project record.wandb reference reference.name reference.placebo rounds
    rounds.answers rounds.batch_size rounds.judge rounds.max_new_tokens rounds.name rounds.path rounds.revision
    rounds.share rounds.temperature rounds.template save_dtype score score.model score.name seed split
    split.disjoint_prompts split.equal split.keep split.level split.measure split.name split.num_chunks split.within
    start steps tune tune.name
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
    steps.reference_leverage steps.reused steps.runs_on_gpu steps.seconds steps.sources steps.sources.* steps.t
    steps.tokens_per_second steps.utilisation trained_steps
steps/1/train.json
    entries entries.* entries.chosen_logp entries.grad_norm entries.kl_proxy entries.lambda_mean entries.lambda_std
    entries.loss entries.lr entries.margin entries.memory_gb entries.pairs entries.rejected_logp
    entries.reward_accuracy entries.runs_on_gpu entries.seconds entries.tokens entries.tokens_per_second
    entries.update entries.utilisation speed speed.runs_on_gpu speed.tokens_per_second speed.utilisation windows
    windows.first_update windows.gamma_ref_mean windows.num_pairs windows.weights_hash
answers/decoding.json
    batch_size max_new_tokens preset seed temperature top_p
metrics.jsonl, train
    * chosen_logp grad_norm kind kl_proxy lambda_mean lambda_std loss lr margin memory_gb pairs rejected_logp
    reward_accuracy runs_on_gpu seconds t tokens tokens_per_second update utilisation
metrics.jsonl, step
    first_loss gamma_ref_mean gamma_ref_negative_share kind lambda_mean lambda_std last_loss num_pairs
    reference_leverage reused runs_on_gpu seconds sources sources.* t tokens_per_second utilisation
metrics.jsonl, eval
    eval eval.* eval.*.high eval.*.low eval.*.n eval.*.value kind t
metrics.jsonl, answers
    answers answers.answers answers.before answers.dataset answers.id answers.turns decoding decoding.batch_size
    decoding.max_new_tokens decoding.preset decoding.seed decoding.temperature decoding.top_p kind t
measures
    generate/ended generate/kl generate/tokens preference/a/gamma preference/a/ranking_accuracy
    preference/a/reward_accuracy_initial preference/a/shorter_accuracy preference/b/gamma preference/b/ranking_accuracy
    preference/b/reward_accuracy_initial preference/b/shorter_accuracy preference/chosen_logp preference/gamma
    preference/gamma_ref preference/log_ratio_chosen preference/log_ratio_rejected
    preference/margin_initial preference/margin_step
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
