//! `tollway inspect`: looks at a running server.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use tollway::SessionConfig;
use tollway::observe::{Event, Note, ObserveClient, SessionSnapshot, Snapshot};
use tollway::queue::{QueueSnapshot, Unit};

use crate::access::unless_interrupted;
use crate::failure::Failure;
use crate::interrupt::Interrupts;
use crate::tls::ClientArguments;
use crate::units::Place;
use crate::{output, tokens};

/// Shows the sessions and connections of a server, and what happens there.
///
/// The server must know the token as an operator's: see --token-file of `tollway serve`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  tollway inspect tcp://127.0.0.1:7400 --token-file operator.token --watch")]
pub(crate) struct Arguments {
    /// The server.
    #[arg(value_name = "URL")]
    url: Place,
    /// The file with an operator's token.
    #[arg(long, value_name = "FILE")]
    token_file: PathBuf,
    /// Go on and tell what happens, until Ctrl-C.
    #[arg(long)]
    watch: bool,
    /// Print a JSON object a line: the snapshot, then each event.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    tls: ClientArguments,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Line<'a> {
    Snapshot(&'a Snapshot),
    Event(&'a Event),
    Missed(u64),
}

pub(crate) async fn run(arguments: Arguments, interrupts: Interrupts) -> Result<(), Failure> {
    let mut config = SessionConfig::default();
    config.protocol.metadata.push(tokens::client(&arguments.token_file)?);
    let options = arguments.tls.options()?;
    let connecting = tollway::connect_with(&arguments.url.0, config, &options);
    let session = unless_interrupted(&interrupts, connecting).await??;
    let client = ObserveClient::open(&session).await?;
    // Before the snapshot, so that nothing falls between the two.
    let notes = if arguments.watch { Some(client.subscribe().await?) } else { None };
    let snapshot = client.snapshot().await?;
    match arguments.json {
        true => output::json(&Line::Snapshot(&snapshot))?,
        false => output::line(&table(&snapshot))?,
    }
    let Some(mut notes) = notes else { return Ok(()) };
    // Watching ends with Ctrl-C: that is success.
    while let Ok(note) = unless_interrupted(&interrupts, notes.recv()).await {
        let Some(note) = note? else { break };
        match (&note, arguments.json) {
            (Note::Event(event), true) => output::json(&Line::Event(event))?,
            (Note::Missed(missed), true) => output::json(&Line::Missed(*missed))?,
            (Note::Event(event), false) => output::line(&told(event))?,
            (Note::Missed(missed), false) => output::line(&format!("{missed} events were missed"))?,
        }
    }
    Ok(())
}

fn table(snapshot: &Snapshot) -> String {
    let mut lines = vec![match snapshot.left_out {
        0 => format!("{} sessions", snapshot.total),
        left_out => format!("{} sessions, {left_out} of which are not shown", snapshot.total),
    }];
    lines.extend(snapshot.queues.iter().map(queue));
    for session in &snapshot.sessions {
        lines.push(row(session));
        // An empty queue that never held anything says nothing.
        lines.extend(session.queues.iter().filter(|queue| queue.high_water > 0).map(|it| format!("  {}", queue(it))));
        for connection in &session.connections {
            lines.push(format!(
                "  connection {}: {:?}{}{}{}, frames {} in, {} out, calls {} + {} waiting, served {}, streams {}, bodies {} B in, {} B out",
                connection.id,
                connection.state,
                if connection.is_paid { ", paid" } else { "" },
                if connection.is_relayed { ", relayed" } else { "" },
                if connection.is_draining { ", draining" } else { "" },
                connection.traffic.frames_received,
                connection.traffic.frames_sent,
                connection.calls,
                connection.waiting_calls,
                connection.served_calls,
                connection.streams,
                connection.body_bytes_received,
                connection.body_bytes_sent,
            ));
        }
    }
    lines.join("\n")
}

/// A queue: how full it is, and how full it was.
fn queue(queue: &QueueSnapshot) -> String {
    let QueueSnapshot { name, unit, capacity, depth, high_water, stalled, .. } = queue;
    let unit = if *unit == Unit::Bytes { " B" } else { "" };
    let stalled = stalled.map_or_else(String::new, |time| format!(", stands still for {:.1} s", time.as_secs_f64()));
    format!("queue {name}: {depth}{unit} of {capacity}, {high_water} at most{stalled}")
}

fn row(session: &SessionSnapshot) -> String {
    let SessionSnapshot { session: number, peer, identity, age, traffic, stats, .. } = session;
    let rtt = stats.rtt.map_or_else(|| "unknown".to_owned(), |rtt| format!("{:.1} ms", rtt.as_secs_f64() * 1e3));
    format!(
        "session {number}: {peer} ({}), {} s, rtt {rtt}, in {} B, out {} B, connections {}, calls {}, streams {}",
        identity.as_deref().unwrap_or("unproved"),
        Duration::as_secs(age),
        traffic.bytes_received,
        traffic.bytes_sent,
        stats.connections,
        stats.calls,
        stats.streams,
    )
}

fn told(event: &Event) -> String {
    match event {
        Event::SessionOpened { session, peer, identity } => {
            format!("session {session} opened by {peer} ({})", identity.as_deref().unwrap_or("unproved"))
        }
        Event::SessionRefused { peer, code, text } => format!("{peer} was refused: {text} (code {code})"),
        Event::SessionClosed { session, end } => format!("session {session} ended: {end}"),
        Event::ConnectionOpened { session, connection, service } => {
            format!("session {session}: connection {connection} opened{}", of_service(service.as_deref()))
        }
        Event::ConnectionRefused { session, connection, code, text } => {
            format!("session {session}: connection {connection} was refused: {text} (code {code})")
        }
        Event::ConnectionClosed { session, connection, end } => {
            format!("session {session}: connection {connection} ended: {end}")
        }
        _ => format!("{event:?}"),
    }
}

fn of_service(service: Option<&str>) -> String {
    service.map_or_else(String::new, |service| format!(" to {service}"))
}
