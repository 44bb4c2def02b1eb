//! How fast a round is reduced, and in how much memory: `cargo bench -p consort-tests --bench reduction`.
//!
//! Each row is a process of its own, so that its peak memory (VmHWM) is the row's. It opens the deltas as the
//! aggregator does, folds them into the next version several times, and of the last time it also makes the
//! version durable. Bytes count once: the encoded deltas, what is read of the base version and what is
//! written of the new one. They are held against what the same number of threads reaches in memory just
//! before: copying (as STREAM counts it: read and written), reading one vector each, and adding nine vectors to
//! a tenth, which is what eight deltas and a base take. Everything that a row reads is in the page cache, as it
//! is in an aggregator that has just received it; what its copies alone take, each row measures too.
//!
//! More sites than [`DELTAS_MAX`] share files by hard links; such a row's reads come from the cache more
//! often than they would, and it is marked.

use std::{
    fs::{self, File},
    hint::black_box,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context, ensure};
use clap::Parser;
use consort_aggregator::{
    aligned::AlignedVec,
    models::{ModelFiles, ModelLayout},
    reduce::{
        RoundFold, Share, TensorPlan, WeightedContribution, create_initial, has_momentum,
        initial_second_moment,
    },
    spool::{ContributionKey, DeltaLayout, Spool, SpoolLimits},
};
use consort_common::{
    chunk::ChunkPlan,
    codec::{Encoding, ModelEncoding},
    ids::{Digest, RunName},
    spec::{Aggregation, OuterOptimizer, WireSpec},
};
use consort_tests::machine;
use rayon::prelude::*;

/// Deltas of one model and encoding that lie on disk by themselves.
const DELTAS_MAX: u32 = 8;
/// Of the models' tensors, as far as there are so many.
const TENSOR_PARAMETERS: u64 = 1_000_000;
/// What is copied at a time where nothing else is done: an fp32 chunk.
const BLOCK_BYTES: u64 = 1 << 20;
/// What stays free on the disk.
const RESERVE_BYTES: u64 = 4 << 30;

/// Folds deltas and prints a table.
#[derive(Debug, Clone, Parser)]
struct Arguments {
    /// Parameters of the models; several may be given.
    #[arg(long, value_delimiter = ',', default_value = "10000000,125000000")]
    parameters: Vec<u64>,
    /// Numbers of deltas that are averaged.
    #[arg(long, value_delimiter = ',', default_value = "2,8,32")]
    sites: Vec<u32>,
    /// Encodings of the deltas.
    #[arg(long, value_delimiter = ',', default_value = "fp32,bf16,int8")]
    encodings: Vec<String>,
    /// How the model is sent.
    #[arg(long, default_value = "fp32")]
    model: ModelEncoding,
    /// Step with Nesterov momentum instead of plain averaging.
    #[arg(long)]
    momentum: bool,
    /// Rule of aggregation. A rule that compares whole deltas reads them before it folds; fold s includes that,
    /// and bytes count once all the same.
    #[arg(long, default_value = "mean", value_parser = rule)]
    rule: Aggregation,
    /// Times that each round is folded; the fastest counts.
    #[arg(long, default_value_t = 5)]
    repeat: u32,
    /// Where to work; emptied first.
    #[arg(long, default_value = concat!(env!("CARGO_TARGET_TMPDIR"), "/reduction"))]
    directory: PathBuf,
    /// Fold one row, whose files are there, and print its figures: how the table's rows are made.
    #[arg(long, hide = true)]
    row: bool,
    /// What cargo passes to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if arguments.row { arguments.row().run() } else { table(&arguments) }
}

/// A rule by its name, with numbers that three deltas allow.
fn rule(name: &str) -> Result<Aggregation, String> {
    let rules = [
        Aggregation::Mean {},
        Aggregation::ClippedMean { factor: 1.0 },
        Aggregation::TrimmedMean { fraction: 0.25 },
        Aggregation::Median {},
        Aggregation::Krum { hostile: 0 },
        Aggregation::MultiKrum { hostile: 0, selected: 0 },
    ];
    let names = rules.iter().map(Aggregation::name).collect::<Vec<_>>().join(", ");
    let rule = rules.into_iter().find(|rule| rule.name() == name);
    rule.ok_or_else(|| format!("there is no rule {name}; allowed: {names}"))
}

/// One line of the table.
#[derive(Debug, Clone)]
struct Row {
    directory: PathBuf,
    parameters: u64,
    sites: u32,
    encoding: Encoding,
    model: ModelEncoding,
    momentum: bool,
    rule: Aggregation,
    repeat: u32,
}

impl Arguments {
    fn encodings(&self) -> anyhow::Result<Vec<Encoding>> {
        let parse =
            |name: &String| Encoding::parse(name).with_context(|| format!("there is no encoding {name}"));
        self.encodings.iter().map(parse).collect()
    }

    fn row(&self) -> Row {
        Row {
            directory: self.directory.clone(),
            parameters: self.parameters[0],
            sites: self.sites[0],
            encoding: Encoding::parse(&self.encodings[0]).unwrap_or_default(),
            model: self.model,
            momentum: self.momentum,
            rule: self.rule.clone(),
            repeat: self.repeat,
        }
    }
}

fn table(arguments: &Arguments) -> anyhow::Result<()> {
    let threads = rayon::current_num_threads();
    let copy = machine::copy_bytes_per_second(threads);
    let read = machine::read_bytes_per_second(threads);
    // Eight deltas and the base version.
    let sum = machine::sum_bytes_per_second(threads, 9);
    println!(
        "{threads} threads in memory: copy {:.1} GB/s (read and written), read {:.1}, sum of 9 vectors {:.1}",
        copy / 1e9,
        read / 1e9,
        sum / 1e9
    );
    let optimizer = if arguments.momentum { "Nesterov" } else { "FedAvg" };
    let rule = arguments.rule.name();
    println!("{rule}, {optimizer}, model sent as {}, best of {}\n", arguments.model, arguments.repeat);
    println!(
        "{:>12} {:>8} {:>5} {:>7} {:>8} {:>8} {:>8} {:>8} {:>7} {:>7} {:>7} {:>7} {:>8}",
        "parameters",
        "encoding",
        "K",
        "GB",
        "read s",
        "write s",
        "fold s",
        "finish s",
        "GB/s",
        "% copy",
        "% read",
        "% sum",
        "peak MB"
    );
    let mut linked = false;
    for parameters in &arguments.parameters {
        for encoding in arguments.encodings()? {
            let row = Row { parameters: *parameters, encoding, ..arguments.row() };
            let most = arguments.sites.iter().copied().max().unwrap_or_default();
            if let Err(reason) = row.prepare(most) {
                println!("{parameters:>12} {:>8} skipped: {reason}", encoding.name());
                continue;
            }
            for sites in &arguments.sites {
                let needed = row.rule.deltas_min();
                if u64::from(*sites) < needed {
                    println!(
                        "{parameters:>12} {:>8} {sites:>5} skipped: {rule} takes {needed} deltas",
                        encoding.name()
                    );
                    continue;
                }
                let row = Row { sites: *sites, ..row.clone() };
                let Figures { read_seconds, write_seconds, fold_seconds, finish_seconds, peak_bytes } =
                    row.spawn()?;
                let bytes = row.bytes() as f64;
                let rate = bytes / fold_seconds;
                let mark = if *sites > DELTAS_MAX { "*" } else { "" };
                linked |= *sites > DELTAS_MAX;
                println!(
                    "{parameters:>12} {:>8} {:>5} {:>7.2} {read_seconds:>8.3} {write_seconds:>8.3} {fold_seconds:>8.3} {finish_seconds:>8.2} {:>7.1} {:>7.0} {:>7.0} {:>7.0} {:>8.0}",
                    encoding.name(),
                    format!("{sites}{mark}"),
                    bytes / 1e9,
                    rate / 1e9,
                    100.0 * rate / copy,
                    100.0 * rate / read,
                    100.0 * rate / sum,
                    peak_bytes as f64 / 1e6,
                );
            }
        }
    }
    if linked {
        println!(
            "\n* {DELTAS_MAX} deltas on disk, linked under several sites each: they share the page cache"
        );
    }
    println!("\nGB, GB/s: bytes read and written, once each, of fold; %: of the rates in memory above");
    println!(
        "read, write: taking as many bytes from and to the page cache, chunk by chunk, and nothing else"
    );
    println!("finish: hashing the new version, whole and each chunk, while it is synced to the disk");
    println!(
        "skipped by default: 1000000000 parameters, which take 24 GB of disk and of page cache with 2 sites"
    );
    println!("  (--parameters 1000000000 --sites 2 --encodings bf16 --repeat 2)");
    Ok(fs::remove_dir_all(&arguments.directory)?)
}

/// What a row measured.
struct Figures {
    read_seconds: f64,
    write_seconds: f64,
    fold_seconds: f64,
    finish_seconds: f64,
    peak_bytes: u64,
}

impl Row {
    fn run_name() -> RunName {
        "reduction".parse().expect("a name")
    }

    fn models(&self) -> ModelFiles {
        ModelFiles::new(self.directory.join("models"))
    }

    fn spool(&self) -> Spool {
        Spool::new(self.directory.join("spool"), SpoolLimits::default())
    }

    fn optimizer(&self) -> OuterOptimizer {
        if self.momentum {
            OuterOptimizer::Nesterov { learning_rate: 0.7, momentum: 0.9 }
        } else {
            OuterOptimizer::FedAvg {}
        }
    }

    fn layout(&self) -> ModelLayout {
        ModelLayout {
            plan: ChunkPlan::new(self.parameters, WireSpec::default().chunk_parameters),
            encoding: self.model,
            momentum: has_momentum(&self.optimizer()),
            second_moment: initial_second_moment(&self.optimizer()).is_some(),
            fragments: 1,
        }
    }

    /// Tensors of a million values.
    fn tensors(&self) -> TensorPlan {
        let ends = (1..).map(|tensor| tensor * TENSOR_PARAMETERS).take_while(|end| *end < self.parameters);
        TensorPlan::with_ends(ends.chain([self.parameters]))
    }

    fn delta_layout(&self) -> DeltaLayout {
        DeltaLayout::new(self.layout().plan, self.encoding)
    }

    fn key(site: u32) -> ContributionKey {
        ContributionKey {
            run: Self::run_name(),
            round: 1,
            site: format!("site-{site:03}").parse().expect("a name"),
            delta: [1; 16].into(),
        }
    }

    fn delta_path(&self, site: u32) -> PathBuf {
        let directory = self.directory.join("spool/reduction/1").join(Self::key(site).site.as_str());
        directory.join(format!("{}.delta", "01".repeat(16)))
    }

    /// Bytes of the base version's vectors that are read.
    fn base_bytes(&self) -> u64 {
        let layout = self.layout();
        let vectors = 1 + u64::from(layout.momentum) + u64::from(layout.has_residual());
        vectors * self.parameters * size_of::<f32>() as u64
    }

    /// Bytes of the new version.
    fn written_bytes(&self) -> u64 {
        let plan = self.layout().plan;
        let update = self.model.update().map_or(0, |encoding| DeltaLayout::new(plan, encoding).delta_bytes());
        self.base_bytes() + update
    }

    fn bytes(&self) -> u64 {
        u64::from(self.sites) * self.delta_layout().delta_bytes() + self.base_bytes() + self.written_bytes()
    }

    /// Writes the base version and the deltas.
    fn prepare(&self, sites: u32) -> anyhow::Result<()> {
        let _ = fs::remove_dir_all(&self.directory);
        fs::create_dir_all(&self.directory)?;
        let deltas = sites.min(DELTAS_MAX);
        let needed = u64::from(deltas) * self.delta_layout().file_bytes() + self.base_bytes() + RESERVE_BYTES;
        let needed = needed + self.written_bytes();
        let available = fs4::available_space(&self.directory)?;
        ensure!(
            needed <= available,
            "takes {} GB of disk, of which {} GB are free",
            needed >> 30,
            available >> 30
        );
        let fill = |start, values: &mut [f32]| {
            fill(start, 1.0, values);
            anyhow::Ok(())
        };
        create_initial(&self.models(), &Self::run_name(), self.layout(), fill)?;
        (0..deltas).try_for_each(|site| self.write_delta(site))?;
        for site in deltas..sites {
            let path = self.delta_path(site);
            fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
            fs::hard_link(self.delta_path(site % deltas), path)?;
        }
        Ok(())
    }

    fn write_delta(&self, site: u32) -> anyhow::Result<()> {
        let delta = self.spool().receive(&Self::key(site), self.delta_layout())?;
        let plan = self.layout().plan;
        (0..plan.chunks()).into_par_iter().try_for_each(|index| {
            let mut values = vec![0.0; plan.length(index)?];
            fill(plan.range(index)?.start + u64::from(site), 0.01, &mut values);
            let payload = self.encoding.encode(&values);
            anyhow::Ok(delta.write(index, &payload, Digest::of(&payload))?)
        })?;
        delta.sync(|_| true)?;
        Ok(())
    }

    fn spawn(&self) -> anyhow::Result<Figures> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--row").arg("--directory").arg(&self.directory);
        command.args(["--parameters", &self.parameters.to_string(), "--sites", &self.sites.to_string()]);
        command.args(["--encodings", self.encoding.name(), "--model", &self.model.to_string()]);
        command.args(["--repeat", &self.repeat.to_string(), "--rule", self.rule.name()]);
        if self.momentum {
            command.arg("--momentum");
        }
        let output = command.output()?;
        ensure!(output.status.success(), "a row failed: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout)?;
        let mut numbers = text.split_whitespace();
        let mut next = || numbers.next().context("a row printed too little");
        Ok(Figures {
            read_seconds: next()?.parse()?,
            write_seconds: next()?.parse()?,
            fold_seconds: next()?.parse()?,
            finish_seconds: next()?.parse()?,
            peak_bytes: next()?.parse()?,
        })
    }

    /// In its own process: folds, and prints the seconds of reading, writing, folding and finishing, and the peak memory.
    fn run(&self) -> anyhow::Result<()> {
        let spool = self.spool();
        let deltas: Vec<_> = (0..self.sites)
            .into_par_iter()
            .map(|site| spool.stored(&Self::key(site), self.delta_layout()))
            .collect::<Result<_, _>>()?;
        let shares: Vec<_> = deltas.into_iter().map(|delta| Share { delta, weight: 1.0 }).collect();
        let accepted: Vec<_> = shares
            .iter()
            .map(|share| {
                let (key, encoding) = (share.delta.key().clone(), self.encoding);
                let delta_digest = share.delta.summary()?.digest;
                anyhow::Ok(WeightedContribution { key, weight: share.weight, encoding, delta_digest })
            })
            .collect::<Result<_, _>>()?;
        let read_seconds = self.best(|| self.read_files())?;
        let write_seconds = self.best(|| self.write_file())?;
        let models = self.models();
        let mut fold_seconds = f64::INFINITY;
        let mut finish_seconds = 0.0;
        for time in 1..=self.repeat {
            let base = models.open(&Self::run_name(), 0, self.layout())?;
            let begun = Instant::now();
            let fold = RoundFold::begin(
                shares.clone(),
                base,
                self.optimizer(),
                &self.rule,
                self.tensors(),
                &models,
            )?;
            let begun = if self.rule.compares_deltas() { begun } else { Instant::now() };
            fold.fold_rest()?;
            fold_seconds = fold_seconds.min(begun.elapsed().as_secs_f64());
            if time == self.repeat {
                let begun = Instant::now();
                black_box(fold.finish(&accepted)?);
                finish_seconds = begun.elapsed().as_secs_f64();
            }
        }
        println!("{read_seconds} {write_seconds} {fold_seconds} {finish_seconds} {}", peak_bytes()?);
        Ok(())
    }

    /// The least that `seconds` gives, of as many times as each round is folded.
    fn best(&self, seconds: impl Fn() -> anyhow::Result<f64>) -> anyhow::Result<f64> {
        (0..self.repeat).try_fold(f64::INFINITY, |best, _| Ok(best.min(seconds()?)))
    }

    /// Copies out of the page cache what a fold reads, the files of the deltas and of the base version, and gives
    /// the seconds.
    fn read_files(&self) -> anyhow::Result<f64> {
        let base = fs::read_dir(self.directory.join("models").join(Self::run_name().as_str()).join("0"))?;
        let vectors = base.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
        let begun = Instant::now();
        for path in vectors.into_iter().chain((0..self.sites).map(|site| self.delta_path(site))) {
            let file = File::open(path)?;
            each_block(file.metadata()?.len(), |block, at| file.read_exact_at(block, at))?;
        }
        Ok(begun.elapsed().as_secs_f64())
    }

    /// Copies into the page cache as much as a fold writes, to a new file with its space reserved as the fold has it,
    /// and gives the seconds.
    fn write_file(&self) -> anyhow::Result<f64> {
        let path = self.directory.join("written");
        let file = File::create(&path)?;
        fs4::FileExt::allocate(&file, self.written_bytes())?;
        let begun = Instant::now();
        each_block(self.written_bytes(), |block, at| file.write_all_at(block, at))?;
        let seconds = begun.elapsed().as_secs_f64();
        fs::remove_file(path)?;
        Ok(seconds)
    }
}

/// Calls `work` with a block of memory for each [`BLOCK_BYTES`] of a file, and with where they begin, on all cores.
fn each_block(bytes: u64, work: impl Fn(&mut [u8], u64) -> io::Result<()> + Sync) -> io::Result<()> {
    let begins = (0..bytes.div_ceil(BLOCK_BYTES)).into_par_iter().map(|block| block * BLOCK_BYTES);
    begins.try_for_each_init(AlignedVec::default, |block, at| {
        block.resize(BLOCK_BYTES.min(bytes - at) as usize);
        work(block, at)
    })
}

/// Numbers that look like weights and cost little: at each position another, of the size `scale`.
#[allow(clippy::cast_precision_loss)]
fn fill(start: u64, scale: f32, values: &mut [f32]) {
    for (at, value) in (start..).zip(values) {
        let bits = at.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        *value = scale * ((bits >> 40) as f32 / (1u64 << 24) as f32 - 0.5);
    }
}

/// The most memory that this process has had.
fn peak_bytes() -> anyhow::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").trim().parse()?;
    Ok(kib * 1024)
}
