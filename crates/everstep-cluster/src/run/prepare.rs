//! From a user's files to a run directory, with every mistake found before anything is written that would have to be undone.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use everstep_data::Dataset;
use everstep_optim::{Layout, TrainingNumerics};
use everstep_store::{Digest, PutRun, RunIdentity, RunStore, StoreError};
use everstep_train::{Backend, Election, NumericDifference, PretrainingData, RunConfig};
use everstep_transport::ClusterCa;

use super::initial::{self, InitialWeights};
use super::{RunContext, RunError, Timing, absolute, placement, short};
use crate::agent::lock::AgentLock;
use crate::life;
use crate::rundir::RunDir;
use crate::session;
use crate::topology::Topology;

/// What the user asks for.
#[derive(Clone, Debug)]
pub struct RunRequest {
    /// The run file.
    pub run_file: PathBuf,
    /// `field=value` overrides.
    pub set: Vec<String>,
    /// The topology file; everything in one process without it.
    pub topology: Option<PathBuf>,
    /// The run directory; `runs/<name>` without it.
    pub run_dir: Option<PathBuf>,
    /// The node that this machine is; all processes are local without it.
    pub node: Option<String>,
    /// Goes on with another device kind, libtorch or instruction set than the run was started with.
    pub allow_other_platform: bool,
}

impl RunContext {
    /// Reads and checks what the user gave, prepares data, certificates and store, and lays out the run directory.
    ///
    /// # Errors
    /// One line that names the file, the field and what is allowed.
    pub async fn prepare(
        request: RunRequest,
        backend: &dyn Backend,
        say: impl Fn(&str),
    ) -> Result<Self, RunError> {
        let mut config = RunConfig::read(&request.run_file, &request.set)?;
        let mut topology = match &request.topology {
            Some(path) => Topology::read(path)?,
            None => Topology::laptop(1),
        };
        if topology.cluster.replication.is_none() {
            topology.check_replication(
                config.cluster.replication,
                "cluster.replication of the run file",
            )?;
        }
        if let Some(node) = &request.node
            && !topology
                .processes
                .iter()
                .any(|process| process.node == *node)
        {
            return Err(RunError::User(format!(
                "--node: the topology has no process on a node \"{node}\""
            )));
        }
        let run_dir = RunDir::new(
            request
                .run_dir
                .clone()
                .unwrap_or_else(|| Path::new("runs").join(&config.run.name)),
        );
        let nodes = match &request.node {
            Some(node) => vec![node.clone()],
            None => topology.nodes(),
        };
        let lock = AgentLock::acquire(&run_dir, &nodes)
            .map_err(|error| RunError::User(error.to_string()))?;
        let store_url = config
            .run
            .store
            .clone()
            .unwrap_or_else(|| run_dir.default_store());
        let store = RunStore::open(&store_url, &config.run.name)?;
        let resuming = run_dir.run_file().exists();
        let needs_leases =
            config.cluster.election == Election::Store && !topology.is_single_process();
        let has_store = match check_store(&store, needs_leases).await {
            Ok(()) => true,
            // What is checked here was checked when the run began. Its processes start, and wait for the store where they need it.
            Err(error) if resuming && error.is_outage() => {
                say(&format!("{error}; going on without the store for now"));
                false
            }
            Err(error) => return Err(error.into()),
        };
        initial::resolve(&mut config, &request.run_file, &run_dir)?;
        let dataset = if resuming {
            Dataset::open(&run_dir.data())?
        } else {
            say("preparing data");
            let base = absolute(&request.run_file);
            everstep_data::open_or_prepare(
                &config.data,
                base.parent().unwrap_or(Path::new(".")),
                &run_dir.data(),
            )
            .map_err(|error| RunError::User(format!("{}: {error}", request.run_file.display())))?
        };
        config.resolve_vocab(dataset.vocab_size(), &request.run_file)?;
        if request.topology.is_none() {
            topology = Topology::laptop(placement::num_workers(&config, backend)?);
        }
        if resuming {
            same_run(&run_dir, &config, &request.run_file)?;
        }
        let nodes_here = |node: &str| request.node.as_deref().is_none_or(|own| own == node);
        if !topology.is_single_process() {
            match living_topology(&run_dir, &topology, &config)? {
                // How processes are supervised is the new agent's affair.
                Some(living) => {
                    topology = Topology {
                        agent: topology.agent,
                        preemption: topology.preemption,
                        ..living
                    }
                }
                None => topology.resolve_ports(nodes_here)?,
            }
            certificates(&run_dir, &topology, request.node.is_some())?;
        }
        write_layout(&run_dir, &config, &topology)?;
        let mut run = Self::assemble(config, topology, run_dir, dataset)?;
        run.identity.environment = run.environment(backend)?;
        run._lock = Some(lock);
        if has_store {
            run.put_identity(&store, &request).await?;
        }
        let manifest = run.dataset().manifest();
        say(&format!(
            "{}: {} parameters in {} blocks, {} training tokens, vocabulary {}",
            run.name(),
            run.layout().num_elements(),
            run.num_blocks(),
            manifest.train.tokens,
            run.dataset().vocab_size(),
        ));
        Ok(run)
    }

    /// The run that lives in `run_dir`.
    ///
    /// # Errors
    /// There is none, or a file of it is damaged.
    pub fn open(run_dir: &RunDir) -> Result<Self, RunError> {
        let file = run_dir.run_file();
        if !file.exists() {
            return Err(RunError::User(format!(
                "{}: no run here (run.toml is missing)",
                run_dir.path().display()
            )));
        }
        let config = RunConfig::read(&file, &[])?;
        let topology = Topology::of_run(run_dir)?;
        let dataset = Dataset::open(&run_dir.data())?;
        Self::assemble(config, topology, run_dir.clone(), dataset)
    }

    fn assemble(
        config: RunConfig,
        topology: Topology,
        run_dir: RunDir,
        dataset: Dataset,
    ) -> Result<Self, RunError> {
        let user = |error: &dyn std::fmt::Display| RunError::User(error.to_string());
        let parameters = config.parameters();
        let layout =
            Arc::new(Layout::new(parameters, config.cluster.block_params).map_err(|e| user(&e))?);
        let numerics =
            TrainingNumerics::new(layout.clone(), config.optimizer(), config.compute.dtype)
                .map_err(|e| user(&e))?
                .with_policy(config.policy.losses());
        let data = PretrainingData::new(&config, Arc::new(dataset))?;
        let end = data.dataset().manifest().tokenizer.eot;
        if config.data.document_mask && end.is_none() {
            return Err(RunError::User(
                "data.document_mask: is true; allowed: with a tokenizer that has an end-of-text token, of kind bpe or file"
                    .to_owned(),
            ));
        }
        let manifest = data.dataset().manifest();
        let identity = RunIdentity {
            run: config.run.name.clone(),
            seed: config.run.seed,
            configuration: Digest::of(config.numeric_identity().as_bytes()),
            dataset: Digest::of(manifest.digest().as_bytes()),
            tokenizer: Digest::of(data.dataset().tokenizer().digest().as_bytes()),
            layout: Digest::from(layout.digest()),
            determinism: config.run.determinism.to_string(),
            environment: BTreeMap::new(),
        };
        let run_id = short(identity.digest());
        let timing = Timing::default();
        let initial_weights = InitialWeights::of(&config.model, &run_dir);
        Ok(Self {
            config,
            topology,
            identity,
            run_id,
            numerics,
            timing,
            run_dir,
            data,
            initial_weights,
            _lock: None,
        })
    }

    /// Writes the run into the store, or checks that it is the same run.
    async fn put_identity(&self, store: &RunStore, request: &RunRequest) -> Result<(), RunError> {
        let PutRun::Existing(existing) = store
            .put_run(&self.config.to_toml(), &self.identity)
            .await?
        else {
            return Ok(());
        };
        let differences = existing.environment_differences(&self.identity);
        if let (Some(difference), false) = (
            differences.first(),
            request.allow_other_platform || self.config.run.determinism.is_relaxed(),
        ) {
            return Err(RunError::User(format!(
                "this machine is not like the one the run was started on: {difference}; a strict run would give other weights here. \
                 Use --allow-other-platform to go on all the same, or determinism = \"relaxed\" for a new run"
            )));
        }
        Ok(())
    }
}

/// Whether the store takes writes, holds nothing of a newer program, and can decide elections if it has to.
async fn check_store(store: &RunStore, needs_leases: bool) -> Result<(), StoreError> {
    store.check_writable().await?;
    store.check_versions().await?;
    if needs_leases {
        store.probe_create_if_absent().await?.require()?;
    }
    Ok(())
}

/// Refuses a run file that would give other numbers than the run that lives in `run_dir`.
fn same_run(run_dir: &RunDir, config: &RunConfig, run_file: &Path) -> Result<(), RunError> {
    let known = RunConfig::read(&run_dir.run_file(), &[])?;
    let differences = known.numeric_differences(config);
    if differences.is_empty() {
        return Ok(());
    }
    let each = |difference: &NumericDifference| {
        format!(
            "{} was {} and is now {}",
            difference.field, difference.known, difference.given
        )
    };
    Err(RunError::User(format!(
        "{}: this is not the run that lives in {}: {}; restore the value or choose another --run-dir",
        run_file.display(),
        run_dir.path().display(),
        differences.iter().map(each).collect::<Vec<_>>().join(", "),
    )))
}

/// The topology of processes that an earlier agent left alive, with the ports that they use. They know one topology and one run file until
/// they end, so both must be the same now.
fn living_topology(
    run_dir: &RunDir,
    topology: &Topology,
    config: &RunConfig,
) -> Result<Option<Topology>, RunError> {
    let Some(known) = fs::read(run_dir.topology())
        .ok()
        .and_then(|bytes| serde_json::from_slice::<Topology>(&bytes).ok())
    else {
        return Ok(None);
    };
    let living = life::all_living(run_dir, &known);
    if living.is_empty() {
        return Ok(None);
    }
    let other = if !known.is_same_but_for_ports(topology) {
        "topology"
    } else if fs::read_to_string(run_dir.run_file()).ok() != Some(config.to_toml()) {
        "run file"
    } else {
        return Ok(Some(known));
    };
    Err(RunError::User(format!(
        "{}: {} of its processes are alive ({}) and use another {other}; start with the one they use, or end them first",
        run_dir.path().display(),
        living.len(),
        living.join(", ")
    )))
}

/// Certificates for every process. On a node of a larger cluster they come from `everstep certs` and must be there.
fn certificates(run_dir: &RunDir, topology: &Topology, is_node: bool) -> Result<(), RunError> {
    let tls = run_dir.tls();
    if is_node {
        return Ok(());
    }
    let ca = ClusterCa::load_or_create(&tls)?;
    for process in &topology.processes {
        if !tls.join(format!("{}.pem", process.name)).exists() {
            ca.issue(&process.name, &tls)?;
        }
    }
    session::make_secret(&tls)
        .map_err(|error| RunError::User(format!("{}: {error}", tls.display())))
}

fn write_layout(run_dir: &RunDir, config: &RunConfig, topology: &Topology) -> Result<(), RunError> {
    let failed = |error: std::io::Error| {
        RunError::User(format!(
            "{}: cannot be written: {error}",
            run_dir.path().display()
        ))
    };
    for folder in [
        run_dir.path().join("logs"),
        run_dir.status(),
        run_dir.path().join("ledger"),
    ] {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    let topology = serde_json::to_vec_pretty(topology).map_err(|error| failed(error.into()))?;
    for (path, bytes) in [
        (run_dir.topology(), topology),
        (run_dir.run_file(), config.to_toml().into_bytes()),
    ] {
        let temporary = path.with_extension("tmp");
        fs::write(&temporary, bytes).map_err(failed)?;
        fs::rename(&temporary, &path).map_err(failed)?;
    }
    Ok(())
}
