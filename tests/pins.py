"""The golden values of test_pins.py. In a block a line at the margin says what was asked, those below it what came.

Keys and hashes are the same everywhere; losses held under `ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE` and under
`ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2` as well.
"""

import re


def blocks(text):
    """{what was asked: words}"""
    parts = [part.split("\n", 1) for part in re.split(r"\n(?=\S)", text.strip())]
    return {name: words.split() for name, words in parts}


MODEL = "723b702f61f86087efa99ffbc06e3c75d296aabdf05e30b32640a5bfcecd53ad"
IDS = ["a-aae5bb9db3eb410f", "b-25931ac7809c941b", "a-bb90d89197765480", "a-343eade991564fa1", "b-f6b425ee0c082904"]
PROMPT = "7082a8efcdbf3fbf"

STEPS = blocks("""
split=by_source
    eeac38a6e3d3956dd4251a97e12d58d11ab01cb98ff691a3c4458d09df7f91b8
    f7edf4abcc7cb6e080fdd1c1f624591964f0e89ab809afb64981fa5c2e8584d1
split=all_at_once reference=initial
    ad93018a8a785dd1b48d19bd759226b381730237ccf19e3597772f61e02820ad
reference=initial
    eeac38a6e3d3956dd4251a97e12d58d11ab01cb98ff691a3c4458d09df7f91b8
    34f671cf60b66025f3ce31e3f54f89cf4596f1899febaea688e34f1fd80bc02e
reference=mixed reference.updates=2
    1a317d66bb6a536f18460f94d3f170528c0761664999dee4845835c41c175f48
    5b70b0fedd5c0a18097d2588c11953b8a372ebc0dc2c2f4ff5313ea41f21df8c
reference=average
    eeac38a6e3d3956dd4251a97e12d58d11ab01cb98ff691a3c4458d09df7f91b8
    033278197948f03ad797ec4561c28a0b333bd8ef3b0b2c18aacc2260b4101abe
reference.placebo=mean_shift
    6df59bad0a108bdd2958b3871c1996468ac2673bef9e38b2c6076c1f702e7d7f
    ae2001b54aa00880f3668b59f81053b7681d4dafda316f4c9678d49a65ef066f
tune=lora
    28211212e1adf8034e9a92e361477b23cc7c7701890cc63547aee9080743fe87
    cf1ecb66a0a8ac441455e2e56e68c3af23923c59ceee22948aa8cd809fe07827
tune=lora tune.between=stack tune.quantize=4bit tune.modules_to_save=[lm_head]
    147c4aba3ec039647704627efda736ebd9adfefd44059456ff5de1a018217e01
    764e2c590fd908b426af5ac9628aa62bfedc50f16492e347daf2e6f8f864cb2b
loss=odpo
    18f1ca6334f5bbd999aed6f55edd10bfa489549c76fdc682acae97032455cb68
    c07f2ffdc475761780725d7fe9cd26f8c21f31146d62d68738a45f3a0ff159b4
loss=simpo reference=none deepspeed=zero2
    77beed42cd45347987920f0b0fc042194670943af995aa2a5644a49fd1547263
    2b076e4d83527c7294c89d979b9bda5038391f1b9774eb7bbde8f4142766dbe6
probe.every=2
    eea63a83e4c49eca37bd568060c97db6ba8b7ccb99d55000fcf70db316d3a2e8
    ffa6771e4938204a4a2f138ef49e955eed586c5ec3fdc7322b986216ee2df1f2
optim.schedule_over=run optim.moments=carry
    ec1dacbc01ba6789dc2f32663bc6a03f03ff1d4855a23c1d4ca6d0112e93e27e
    e09f608d51ca2097a05eafda6083f85e737494c683fb3716ca130213aec75393
+steps.2.optim.lr=1e-4
    eeac38a6e3d3956dd4251a97e12d58d11ab01cb98ff691a3c4458d09df7f91b8
    6ab65ecbb78685d500169b1217c1c34b5221a2b891db0b797cfb1e6a1684ecfc
precision=bf16 save_dtype=bf16 launch.ranks=2 launch.threads=3 launch.attention=plain launch.compile=true
    8153e2d9df4658be4df042c719c0989d9ee97669b57ad4e71c4da0321cef8da4
    db43f4deab5d9f9bdbcd5ad5af786ee6a1d7dfdf5dc788c33c63eb225774836f
optim.epochs=2 optim.schedule=cosine optim.warmup=0.2 optim.weight_decay=0.1 optim.clip=0 optim.betas=[0.8,0.99]
    a0eefd617ef5fef7027e2304b9f6a2f2efac21efa9af47c9714e9864859f083d
    77ba72eb59c973947712b18ea017c2c6db845b3c6696d222f8b10de2bcd112f5
split=random seed=1
    afc522b8a62b26d398bdd7dd0e31f335a5d28c6fb0f6dd8cc586a2c28fe75adb
    b282721a9c268d61e84da82a60479935b7bb9d89c09d3a1b0a46816e8ba2dab8
split=stratified
    98e7c91c73d67ce8270950341d4507dd803e68b54f81cda3cfed8c085d713885
    2c48b495f395f321ed3244d7e319890a234feb542c9adbdc25659d63ec2cd56d
split=repeat split.num=2 start=initial
    ad93018a8a785dd1b48d19bd759226b381730237ccf19e3597772f61e02820ad
    d3bd02393255373aebb6d78677dc47e579696dd982e57b176280821353f93c53
split=all_at_once split.keep=0.5 score=validation_loss score.repeats=1
    12ad9e4983da7d17a8fa0651c5de910fd162dd0c6fb3d8120aee061fe52d0b35
    b4b5f00262ec8fc8bff96d6773ec2caf2f8a15c0229f44068acd5db0289feca1
experiment=smoke
    b03b1c077fb3e6e43338704888c55e5293760ba3f91429a94caf851186f7d8f3
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
    1927449ce9cac4733ecbb83501c2f03bb164a030fe9af757df1260495d62b780
    2cca6660b8dc2bf4424f626865c7b38627d9994d5ec8dbde837a0e268cc075e8
    47c8ac04f1260b775d5c5baa16e455ba7fe5250492a33db03aed6d3f9c893db7
    5df448a2dfd6d0e0e292343f39c03f885af23d72960189cd541fa27429b4b87f
    6583a09cc4a5cabab71316f7c139817ba7d922055657cdfd9c61eee1835e70d8
    8572fe418f92d42d3152d4bb2ce074839e851f866ff959f31602ce89131a52bc
    ad5578154ccf69bd0f8d4c54772c31eeda8d2c7d4e77f199b16b789387131f03
    ce98e3aeda7c42b4238b7ad38722404ce616a0c64124be4a89930bfbe9192535
    cea34460a71dcd53c2c3cc01a234d42d18e4e52594c32ae03ba9809a8bd4856b
    de6b7f2e528666a76a70c0b0586523e2459e11f663bf15e4b3a989f33cee0df6
answers
    10dba5a95f3de54260e85ac2dbf85de60136a532efa46241f9160d2d1b66884e
    22ea1b708a5d4ff8ddfb560011b9197080ed419727a78987c1a4a747eaf74d67
    8d0dc163dd6ba23116646ea511b99b978afb1b5d228ff3e88aee0e506681042b
    a7c9c262925fd30b4f94c848ca40e578ff3de15a9f5fe45938ad31211585009d
    dd3b31caf073abba16cf68a4855c721a01b991b943bd5bc621c13e767e7a3c44
    de46424ba8f0e360ccfc17b894c7b9f549c57e4ef27a8a9c830d4df09d6d4302
evaluation divergence
    8c18af28e6e8e25dde65b7d0bb8b00433188a70be555dc9bc493e84d04f94112
    a53964529b7cd03d46c4b8074c830493463cb19d593d265bccc9f6e23965e966
    fb93fb6283ed87e10f83b0c25001430e660c73a8a1638cc73e2f658a512e0a92
score
    27feee74c767e16ae8593147822d29edebcb8b98657e13aea3bb220c2c97c2cf
step
    0aed8825592d3503a66f02635316fe081f7959243267ae5bceccc5ab05b3dfd3
    8cd2ac371760f2fc887773a88e75283b75454992abb89b3a661cbdbba01925d0
""")
ASKED = blocks("""
logprobs
    de6b7f2e528666a76a70c0b0586523e2459e11f663bf15e4b3a989f33cee0df6
evaluation lab
    3e8f5f174dd7bde1d7a39d10fce624022bedf19d72a7ab9e140722f46a6e016d
    90f3d5cd8795c870efb4fea3500866a09b914023fab2e9fa8c31927b894f5213
evaluation best_of_n
    b19f07f758572d8d2f07da5d617b14103d77feee4767c5429c89ad84cd14486b
evaluation h4
    3bc0098dbe810e401b6da7b0fd8c90e36fbfd33f47581ef79f88bcd82bad96fe
evaluation benchmark
    975041585c83402c3963ae16af01df2c6eb56d37aa4dbbec8d564a3d9d2878ab
answers
    d22010b2c49cbb980d31b3c043c342c2474791ee5f84a5f11f3f08fa934ed4b3
evaluation divergence
    84b7feadaeaf9b03e2c9f7fcc089ebb2c5ac583ce0d80c69914eb3a81f49d3ce
score
    34d91bd3057de5eda036dfeb6ae4d722c7648c7d2067dcbad07bdac842e2635d
mean
    75c3ed850bb9844c79e8cc2220a888e8cd5ed985e9eaeae95b2f92833ea5dc7f
rounded
    61d0e576aeffdd2d4a0c7c558af46726797bc8409afc542a4b3113e1fe54dc47
model
    3d8158cb38ca01935572fccd59cb99ee64d2f2f4c6254b6675baf0c8b1811aa9
pairs
    a90a71ead546121f81740936e7e96b4663dc018a16ab809833955ead924bb416
""")
DETERMINANTS = """
answers decoding device precision prompts template tokenizer torch transformers weights
evaluation answers device initial precision suite torch transformers weights
evaluation asking batch_size device limit lm_eval local precision ranks shares suite tasks tokenizer weights
evaluation batch_size device limit lm_eval local mmlu precision shares suite tokenizer weights
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
    evaluate.preference.name launch launch.any_ranks launch.attention launch.checkpoint_minutes launch.compile
    launch.device launch.kernels launch.memory launch.nodes launch.ranks launch.recompute_activations launch.threads
    launch.timeout_minutes launch.tokens_per_pack loss loss.beta loss.label_smoothing loss.name model model.device
    model.lab model.lab.heads model.lab.layers model.lab.width model.lr model.name model.parameters model.path
    model.revision model.seed model.sft model.template model.trust_remote_code optim optim.betas optim.clip optim.epochs
    optim.lr optim.moments optim.pairs_per_update optim.schedule optim.schedule_over optim.states optim.warmup
    optim.weight_decay plan precision probe probe.answers_every probe.every probe.file probe.max_new_tokens
    probe.num_pairs record
    record.every record.mode record.project record.wandb reference reference.name reference.placebo rounds
    rounds.answers rounds.batch_size rounds.endpoint rounds.judge rounds.max_new_tokens rounds.name rounds.path
    rounds.revision rounds.share rounds.temperature rounds.template save_dtype score score.model score.name seed split
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
    files.sha256 files.side files.unread_columns sources sources.held_out sources.held_out.*
    sources.held_out.*.chosen_chars
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
    initial.eval.*.low initial.eval.*.n initial.eval.*.value reused_steps seconds spent spent.evaluation spent.hash
    spent.load spent.other spent.reference spent.save spent.updates spent.wait steps steps.eval steps.eval.*
    steps.eval.*.high steps.eval.*.low steps.eval.*.n steps.eval.*.value steps.first_loss steps.gamma_ref_mean
    steps.gamma_ref_negative_share steps.lambda_mean steps.lambda_std steps.last_loss steps.num_pairs
    steps.reference_leverage steps.reused steps.runs_on_gpu steps.seconds steps.sources steps.sources.* steps.t
    steps.tokens_per_second steps.utilisation trained_steps
steps/1/train.json
    entries entries.* entries.chosen_logp entries.grad_norm entries.kl_proxy entries.lambda_mean entries.lambda_std
    entries.loss entries.lr entries.margin entries.memory_gb entries.pairs entries.rejected_logp
    entries.reward_accuracy entries.seconds entries.tokens entries.tokens_per_second entries.update
    speed speed.runs_on_gpu speed.tokens_per_second speed.utilisation windows windows.first_update
    windows.gamma_ref_mean windows.num_pairs windows.weights_hash
answers/decoding.json
    batch_size max_new_tokens preset seed temperature top_p
metrics.jsonl, train
    * chosen_logp grad_norm kind kl_proxy lambda_mean lambda_std loss lr margin memory_gb pairs rejected_logp
    reward_accuracy seconds t tokens tokens_per_second update
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
