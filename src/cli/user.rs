//! `stockade user`: users without a request, such as the first admin, and the last one who left.

use std::io::{self, BufRead, Write};
use std::num::NonZeroUsize;
use std::sync::Arc;

use anyhow::{Context, bail};
use chrono::{DateTime, Utc};
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use stockade::auth;
use stockade::auth::accounts::{AccountError, register};
use stockade::auth::email::Email;
use stockade::auth::password::PasswordHasher;
use stockade::clock;
use stockade::config::Config;
use stockade::metrics::PasswordMetrics;
use stockade::store::DatabaseSettings;
use stockade::store::users::{ManagedUser, UserChange, UserFilter, Users};

/// Rows that are asked for at once.
const ROWS: i64 = 1_000;

#[derive(Debug, Subcommand)]
pub(crate) enum UserCommand {
    /// Add a user; the password is the first line of standard input.
    Add {
        #[command(flatten)]
        whom: Whom,
        /// What the user may do.
        #[arg(long, value_enum)]
        role: UserRole,
        /// How the user is called.
        #[arg(long, default_value = "Operator")]
        name: String,
        /// Make up a password and print it, this once, instead of reading one.
        #[arg(long)]
        generate_password: bool,
    },
    /// Let a user do more or less. Sessions end; the next login has the new role.
    Role {
        #[command(flatten)]
        whom: Whom,
        /// What the user may do.
        #[arg(long, value_enum)]
        role: UserRole,
    },
    /// End a user's sessions and API keys, and let nobody log in as that user.
    Disable(Whom),
    /// Let a disabled user log in again.
    Enable(Whom),
    /// List users, the newest first.
    List {
        /// Only those with this role.
        #[arg(long, value_enum)]
        role: Option<UserRole>,
        /// Print one JSON document instead of lines.
        #[arg(long)]
        json: bool,
    },
}

/// Which user.
#[derive(Debug, Args)]
pub(crate) struct Whom {
    /// The e-mail address to log in with.
    #[arg(long)]
    email: String,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum UserRole {
    Buyer,
    Operator,
    Admin,
}

impl From<UserRole> for auth::Role {
    fn from(role: UserRole) -> Self {
        match role {
            UserRole::Buyer => Self::Buyer,
            UserRole::Operator => Self::Operator,
            UserRole::Admin => Self::Admin,
        }
    }
}

/// A user, as it is printed.
#[derive(Serialize)]
struct Line {
    id: String,
    role: String,
    email: String,
    name: String,
    created_at: DateTime<Utc>,
    disabled_at: Option<DateTime<Utc>>,
}

impl From<ManagedUser> for Line {
    fn from(user: ManagedUser) -> Self {
        Self {
            id: user.id.to_string(),
            role: user.role,
            email: user.email,
            name: user.name,
            created_at: user.created_at,
            disabled_at: user.disabled_at,
        }
    }
}

pub(super) fn run(command: &UserCommand, config: &Config) -> anyhow::Result<()> {
    match command {
        UserCommand::Add {
            whom,
            role,
            name,
            generate_password,
        } => add(whom, (*role).into(), name, *generate_password, config),
        UserCommand::Role { whom, role } => {
            let role = Some(auth::Role::from(*role).as_str());
            let change = UserChange {
                role,
                ..UserChange::default()
            };
            manage(whom, change, config)
        }
        UserCommand::Disable(whom) => disable(whom, true, config),
        UserCommand::Enable(whom) => disable(whom, false, config),
        UserCommand::List { role, json } => list(*role, *json, config),
    }
}

fn add(
    whom: &Whom,
    role: auth::Role,
    name: &str,
    generate: bool,
    config: &Config,
) -> anyhow::Result<()> {
    let email = Email::parse(&whom.email).context("--email is not an e-mail address")?;
    let password = if generate {
        auth::session::RefreshToken::random()?.text()
    } else {
        let mut line = String::new();
        io::stdin().lock().read_line(&mut line)?;
        line.trim_end_matches(['\r', '\n']).to_owned()
    };
    auth::password::check(&password).context("the password on standard input is too weak")?;
    let added = super::block_on(async {
        let users = users(config).await?;
        let metrics = PasswordMetrics::default();
        let passwords = PasswordHasher::new(config.bcrypt_cost, NonZeroUsize::MIN, 1, metrics)?;
        let name = name.to_owned();
        let chosen = password.clone();
        anyhow::Ok(register(&users, &passwords, email, name, chosen, role).await)
    })?;
    let mut out = io::stdout().lock();
    match added {
        Ok(user) => writeln!(out, "{} {} {}", user.id, user.role, user.email)?,
        Err(AccountError::EmailTaken) => bail!("a user with this e-mail address exists"),
        Err(error) => return Err(error.into()),
    }
    if generate {
        writeln!(out, "password: {password}")?;
    }
    Ok(())
}

fn disable(whom: &Whom, disabled: bool, config: &Config) -> anyhow::Result<()> {
    let change = UserChange {
        disabled: Some(disabled),
        ..UserChange::default()
    };
    manage(whom, change, config)
}

/// Nodes hear of it within seconds, as of what one of them does.
fn manage(whom: &Whom, change: UserChange, config: &Config) -> anyhow::Result<()> {
    let email = Email::parse(&whom.email).context("--email is not an e-mail address")?;
    let (user, ended) = super::block_on(async {
        let users = users(config).await?;
        let known = users.by_email(email.as_str()).await?;
        let known = known.context("no user has this e-mail address")?;
        let changed = users.change(known.user.id, change, clock::now()).await?;
        changed.context("the user has been deleted meanwhile")
    })?;
    let mut out = io::stdout().lock();
    print(&mut out, &user.into())?;
    writeln!(out, "{} sessions ended", ended.len())?;
    Ok(())
}

fn list(role: Option<UserRole>, json: bool, config: &Config) -> anyhow::Result<()> {
    let lines = super::block_on(async {
        let users = users(config).await?;
        let filter = UserFilter {
            role: role.map(|role| auth::Role::from(role).as_str()),
            ..UserFilter::default()
        };
        let mut lines: Vec<Line> = Vec::new();
        let mut after = None;
        loop {
            let rows = users.list(filter.clone(), after, ROWS).await?;
            let Some(last) = rows.last() else {
                return Ok(lines);
            };
            after = Some(last.id);
            lines.extend(rows.into_iter().map(Line::from));
        }
    })?;
    let mut out = io::stdout().lock();
    if json {
        return super::print_json(&mut out, &lines);
    }
    for line in &lines {
        print(&mut out, line)?;
    }
    writeln!(out, "{} users", lines.len())?;
    Ok(())
}

fn print(out: &mut impl Write, line: &Line) -> io::Result<()> {
    let state = line.disabled_at.map_or("", |_| " (disabled)");
    let Line {
        id,
        role,
        email,
        name,
        ..
    } = line;
    writeln!(out, "{id} {role}{state} {email} {name:?}")
}

async fn users(config: &Config) -> anyhow::Result<Users> {
    let endpoints = super::endpoints(config)?;
    let database = super::migrated(&endpoints, DatabaseSettings::default()).await?;
    Ok(Users::new(database, Arc::new(config.data_keys()?)))
}
