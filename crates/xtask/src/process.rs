//! Running other programs: say what runs, and fail with what was run.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::workspace::Workspace;

/// The command line as one would type it.
pub(crate) fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|argument| {
        let argument = argument.to_string_lossy();
        if argument.is_empty()
            || argument.contains(|c: char| c.is_whitespace() || "\"'[]$*".contains(c))
        {
            format!("'{}'", argument.replace('\'', r"'\''"))
        } else {
            argument.into_owned()
        }
    }));
    words.join(" ")
}

/// Runs `command` with the terminal as its own, printing it first; an exit status other than 0 is an error.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let line = shown(command);
    println!("$ {line}");
    let status = command
        .status()
        .with_context(|| format!("cannot start `{line}`"))?;
    if !status.success() {
        bail!("`{line}` ended with {status}");
    }
    Ok(())
}

/// Runs `command` quietly and returns its standard output; its standard error is part of the error, if any.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let line = shown(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{line}`"))?;
    if !output.status.success() {
        bail!(
            "`{line}` ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether `program` starts and ends well when asked for its version.
pub(crate) fn is_there(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .stdin(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// The cargo that started us, run in the root of the checkout.
pub(crate) fn cargo(workspace: &Workspace) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace.root());
    // `cargo run` described this crate in our environment. Build scripts that watch such variables, as torch-sys watches
    // LIBTORCH, would see other values than under plain `cargo build` and build again each time.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_PKG_")
            || name.starts_with("CARGO_MANIFEST_")
            || name == "CARGO_BIN_NAME"
        {
            command.env_remove(&*name);
        }
    }
    if workspace.libtorch_of_user().is_none() {
        command.env_remove("LIBTORCH");
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines_are_quoted_where_a_shell_needs_it() {
        let mut command = Command::new("everstep");
        command.args(["train", "--set", "data.train=[\"a b\"]", ""]);
        assert_eq!(
            shown(&command),
            "everstep train --set 'data.train=[\"a b\"]' ''"
        );
    }

    #[test]
    fn a_failing_command_is_named_with_what_it_said() {
        let error = output(Command::new("sh").args(["-c", "echo broken >&2; exit 3"]))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("exit 3") && error.contains("broken"),
            "{error}"
        );
    }
}
