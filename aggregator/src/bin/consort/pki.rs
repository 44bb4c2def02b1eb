//! `consort pki`: the federation's CA and its members' kits. Needs no aggregator and no connection.

use std::{io::Write, path::PathBuf, time::SystemTime};

use anyhow::bail;
use clap::{
    Args, Subcommand,
    builder::{PossibleValuesParser, TypedValueParser},
    value_parser,
};
use consort_aggregator::pki::{self, Authority, CA_DAYS, Host, KIT_DAYS, KitOrder};
use consort_common::{
    identity::{Federation, Role},
    ids::SiteName,
    tls::ServerAddress,
};
use time::OffsetDateTime;

/// Longest validity that can be asked for: 100 years.
const DAYS_MAX: i64 = 36_500;

/// Make the federation's CA and its members' kits
#[derive(Debug, Subcommand)]
pub enum PkiCommand {
    /// Make the federation's CA (once; its key stays on this machine)
    #[command(after_help = "Example:\n  consort pki init --federation hospitals")]
    Init(InitArguments),
    /// Issue a certificate and write the kit (key, certificate, CA, configuration) of a member
    #[command(
        after_help = "Example:\n  consort pki issue aggregator main --host aggregator.example.org\n  consort pki issue site hospital-north"
    )]
    Issue(IssueArguments),
    /// List the certificates that were issued, and when they expire
    #[command(after_help = "Example:\n  consort pki list")]
    List(ListArguments),
}

/// Where the CA is.
#[derive(Debug, Args)]
pub struct DirectoryArgument {
    /// Folder of the CA and the kits
    #[arg(long, value_name = "DIR", default_value = "pki")]
    directory: PathBuf,
}

/// What a new CA is to be.
#[derive(Debug, Args)]
pub struct InitArguments {
    #[command(flatten)]
    place: DirectoryArgument,
    /// Name of the federation: a-z, 0-9 and '-'
    #[arg(long, value_name = "NAME")]
    federation: Federation,
    /// Days until the CA's certificate expires
    #[arg(long, value_name = "DAYS", default_value_t = CA_DAYS, value_parser = value_parser!(u32).range(1..=DAYS_MAX))]
    valid_days: u32,
    /// Set a CA that exists aside (every kit that it issued becomes useless)
    #[arg(long)]
    force: bool,
}

/// What a new kit is to be.
#[derive(Debug, Args)]
pub struct IssueArguments {
    /// What the member is
    #[arg(value_parser = role_parser())]
    role: Role,
    /// The member's name: a-z, 0-9 and '-'
    name: SiteName,
    #[command(flatten)]
    place: DirectoryArgument,
    /// The kit's folder [default: DIRECTORY/kits/ROLE-NAME]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Host name or IP address of the aggregator, as others reach it (repeatable) [default: localhost and
    /// this machine's name]
    #[arg(long, value_name = "HOST")]
    host: Vec<Host>,
    /// Where the aggregator listens [default: for the aggregator, its first host and port 7443; for
    /// others, what the aggregator's kit said]
    #[arg(long, value_name = "HOST:PORT")]
    endpoint: Option<ServerAddress>,
    /// Days until the certificate expires
    #[arg(long, value_name = "DAYS", default_value_t = KIT_DAYS, value_parser = value_parser!(u32).range(1..=DAYS_MAX))]
    valid_days: u32,
    /// Replace a kit that exists
    #[arg(long)]
    force: bool,
}

/// What to list.
#[derive(Debug, Args)]
pub struct ListArguments {
    #[command(flatten)]
    place: DirectoryArgument,
}

fn role_parser() -> impl TypedValueParser<Value = Role> {
    PossibleValuesParser::new(["site", "operator", "aggregator"]).try_map(|role| role.parse::<Role>())
}

/// Does what the command says.
///
/// # Errors
/// Each with what to do about it.
pub fn run(command: PkiCommand) -> anyhow::Result<()> {
    match command {
        PkiCommand::Init(arguments) => init(&arguments),
        PkiCommand::Issue(arguments) => issue(arguments),
        PkiCommand::List(arguments) => list(&arguments),
    }
}

fn init(arguments: &InitArguments) -> anyhow::Result<()> {
    let InitArguments { place: DirectoryArgument { directory }, federation, valid_days, force } = arguments;
    Authority::init(directory, federation, pki::days_from_now(*valid_days), *force)?;
    let ca = directory.join("ca");
    println!("Made the CA of the federation {federation} in {}.", ca.display());
    println!("Keep {} secret and backed up; no other machine needs it.", ca.join("ca.key").display());
    println!("Next: consort pki issue aggregator NAME --host HOST");
    Ok(())
}

fn issue(arguments: IssueArguments) -> anyhow::Result<()> {
    if arguments.role != Role::Aggregator && !arguments.host.is_empty() {
        bail!(
            "--host is for the aggregator's certificate; to tell a {} where the aggregator listens, use --endpoint HOST:PORT",
            arguments.role
        );
    }
    let order = KitOrder {
        role: arguments.role,
        name: arguments.name,
        hosts: arguments.host,
        endpoint: arguments.endpoint,
        not_after: pki::days_from_now(arguments.valid_days),
        folder: arguments.out,
        force: arguments.force,
    };
    let kit = Authority::open(&arguments.place.directory)?.issue(&order)?;
    println!("Wrote the kit of {} to {}.", kit.identity, kit.folder.display());
    println!("Valid until {}.", kit.not_after.date());
    let config = kit.config.display();
    match kit.identity.role {
        Role::Aggregator => {
            println!("Hosts: {}.", kit.hosts.join(", "));
            println!("Sites and operators will connect to {}.", kit.endpoint);
            if ["localhost", "127.0.0.1", "::1"].contains(&kit.endpoint.host()) {
                println!("That is this machine only: for others, issue it again with --host HOST --force.");
            }
            println!(
                "Next: move the folder to the aggregator's machine; consort-aggregator --config {config}"
            );
        }
        Role::Site => {
            println!("It connects to {}.", kit.endpoint);
            println!(
                "Next: give the folder to the site over a safe channel (it holds a key). There: set data.path"
            );
            println!("in {config}, then consort-client check --config {config}");
        }
        Role::Operator => {
            println!("It connects to {}.", kit.endpoint);
            println!("Next: consort --config {config} runs list");
        }
    }
    Ok(())
}

fn list(arguments: &ListArguments) -> anyhow::Result<()> {
    let issued = pki::issued(&arguments.place.directory)?;
    let now = SystemTime::now();
    // A closed pipe (`| head`) is no error.
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{:<10}  {:<40}  {:<10}  STATE", "ROLE", "NAME", "EXPIRES");
    for certificate in issued {
        let expires = OffsetDateTime::from(certificate.validity.not_after).date();
        let state = match certificate.days_left(now) {
            _ if now > certificate.validity.not_after => "expired".to_owned(),
            days => format!("{days} days"),
        };
        let identity = &certificate.identity;
        let _ = writeln!(out, "{:<10}  {:<40}  {expires:<10}  {state}", identity.role, identity.name);
    }
    Ok(())
}
