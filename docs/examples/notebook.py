# %% [markdown]
# # A notebook: what did each digit pay?
#
# Cells are marked with `# %%`: open this file in VS Code or PyCharm, or with `jupytext` in Jupyter. It also
# runs as a script. It makes its own ledger, so no training and no PyTorch is needed.

# %%
import numpy as np
from sklearn.datasets import load_digits

from per_instance_accountant import WorstCase, account, audit
from per_instance_accountant.ledger import LedgerWriter, Phase, Run, Step, Thresholds
from per_instance_accountant.unlearning import plan_everyone, softmax_regression

# %% [markdown]
# Softmax regression on rows of norm at most 1: the gradient of a row is at most sqrt(2) times its norm, which
# is known before training. Such thresholds make individual epsilons `CERTIFIED`.

# %%
pixels, labels = load_digits(return_X_y=True)
norms = np.minimum(np.linalg.norm(pixels / 80, axis=1), 1.0)
size = len(norms)
known = softmax_regression(
    feature_norm=1.0, num_instances=size, denominator=size / 2, individual_thresholds=True
)
writer = LedgerWriter.create(
    None, Run(num_instances=size, groups={"digit": labels}, assumptions=known.to_dict())
)
writer.append(Thresholds(values=(1.4143 * norms).astype(np.float32), source="fixed"))
writer.append(
    Phase(
        kind="train",
        sampling="poisson",
        sample_rate=0.5,
        noise_std=12.0,
        max_grad_norm=1.42,
        charging="fixed_thresholds",
        denominator=size / 2,
        learning_rate=1.0,
        weight_decay=0.05,
    )
)
for _ in range(100):
    writer.append(Step(positions=np.empty(0, np.int64), contributions=np.empty(0, np.float32)))
ledger = writer.ledger()

# %% [markdown]
# The audit: in a notebook its last line shows a table.

# %%
budgets = audit(ledger, delta=1e-5)
budgets

# %%
print(budgets.statement())

# %%
figure = budgets.plot()

# %% [markdown]
# The same facts under another rule, and as a frame of any library.

# %%
worst = account(ledger, charging=WorstCase())
assert (account(ledger).rdp <= worst.rdp).all()
print(budgets.to_arrow().slice(0, 3).to_pylist())
print(budgets.by_group("digit")[0])

# %% [markdown]
# How hard is each digit to forget?

# %%
everyone = plan_everyone(ledger, 0.1, order=8)
print(everyone)
steps = everyone.plot()

# %%
budgets.report("notebook.html", everyone=everyone, by="digit")
