"""Instruction -> Plan: what every slot goes through, before anything runs."""

from ofakern.plan.build import build_plan, build_plans
from ofakern.plan.nodes import Plan, PlanSegment, PlanSlot

__all__ = ["Plan", "PlanSegment", "PlanSlot", "build_plan", "build_plans"]
